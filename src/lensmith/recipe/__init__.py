"""The API that people arrive with (Unsloth's and TRL's), on one RunConfig and the same runs as `lensmith train`.

    model, tokenizer = FastVisionModel.from_pretrained("Qwen/Qwen3-VL-8B-Instruct", load_in_4bit=True)
    model = FastVisionModel.get_peft_model(model, r=16)
    SFTTrainer(model=model, train_dataset=rows, args=SFTConfig(output_dir="outputs")).train()

keywords.py reads what was given, names_*.py say what each keyword means, arguments.py and model.py turn it into settings,
rows.py writes rows into the run folder, trainer.py runs. docs/recipe.md has the table.
"""

import logging

# Its note about optional kernels, told while peft is imported, would bury what we have to say.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
