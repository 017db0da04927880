"""What became of every URL, and what a corpus is: for whoever asks.

The rooms:

    ledger   one row a URL; totals that must add up
    why      what became of a URL
    what_if  other thresholds on the numbers that a corpus stores → what would change
    report   summary → one HTML file
    card     the dataset card
"""
