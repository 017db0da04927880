"""Starts training; imports neither gpt2train nor data_pipeline and hands on command lines.

The rooms:

    config   how many processes, where
    machine  GPUs, cores, a free port, without torch
    rank     around one rank: its log, its exit code, its end when the launcher ends
    local    all ranks on this machine: started plainly, by torchrun or by the deepspeed launcher; watched, stopped
    run      what can be told before anything starts; dry run
    sweep    one command after another, resumable by trial
"""
