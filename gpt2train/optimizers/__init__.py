"""What torch's own AdamW does not do.

The rooms:

    muon     orthogonalized momentum for the matrices of the blocks, AdamW for all else
    sharing  which rank holds which part of a matrix, and how whole matrices come together and go back
"""
