"""What train_sft.py and train_rl.py share. Nothing here knows a loss.

In the order of a run:

    run           Config -> main; user errors in one line; data, processor, settings, log
    ranks         torchrun's environment -> rank, world, device; sums over ranks; shares of the work
    policy        the model that trains (sharded or not), the one that samples, the reference
    optim         torch.optim on fp32 masters; learning rates
    lengths       rows that are longer than the checkpoint's positions
    batches       order of the data, micro-batches packed by tokens
    metrics       what an RL step adds up to, by path, over all ranks
    folder        a run's directory: its lock, config.json, rows; what --resume may change
    origin        commit and date of a run
    recorded      the flags in config.json, as defaults of a command line
    track         wandb or trackio, which get the rows, too
    interrupt     SIGTERM and Ctrl-C: after the step, saved
    torchrun      torchrun without its traceback, for those who start ranks in a script
    checkpoints   step-000123/: a checkpoint, and trainer/ with all that a resumed run needs

Several ranks give the numbers of one: losses are divided by global counts, gradients are summed,
not averaged. All ranks run the same passes over the same parameters (`batches.equalize_passes`,
`batches.needs_dummy`): to skip a collective is to hang them all.
"""
