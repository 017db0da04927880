"""Starts training; imports neither gpt2train nor data_pipeline and hands on command lines. The standard library alone.

The rooms:

    config      how many processes, where, and with what beside them
    run         what can be told before anything starts; then local, hosts or slurm
    restarts    attempts, until one ends well or another one would be of no use
    local       one attempt on this machine
    hosts       one attempt on several machines: connect, check, start, watch
    connection  a line to another machine: ssh or srun
    node        the other end of that line: the ranks of one machine
    slurm       a batch script that requeues itself; array jobs
    place       which ranks are a machine's, where all meet, what to start: plainly, by torchrun, by deepspeed
    ranks       a machine's ranks while they run: watched, told to stop, cleared away
    rank        around one rank: its log, its exit code, its end when the launcher ends
    outcome     who failed first, and the exit code of the whole
    logs        the folder of logs, one attempt at a time
    machine     GPUs, cores, a free port, without torch
    dry         what would run, as lines for a shell
    words       settings as words of a command line, there and back
    packed      several launches at once, each with its share of the machine
    sweep       one command after another, or packed, resumable by trial

`python launch/__main__.py RUN_DIR key=value … -- COMMAND …` is what a job script calls.
"""
