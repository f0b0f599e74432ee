"""To learn from: a GRPO step taken apart (docs/one_step.md), and a notebook with exercises.

Nothing of the product imports this. step.py takes the step with train_rl.py's own functions,
one_step.py writes the page about it, exercises.py checks what is filled into the notebook.
"""
