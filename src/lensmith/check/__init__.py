"""Before training: every row read, every surprise named, and what the model sees shown.

run_check(config)          reads data.train, and data.test where it is a file
    inspect.py             each row, each picture: faults, oddities, a few numbers; in worker processes
    compare.py             rows with each other: copies, conflicts, leaks
    summary.py             tokens, pictures, packs
-> report.py               what the screen, the JSON object and the page show
fix.py                     a clean copy
"""
