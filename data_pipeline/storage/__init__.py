"""A corpus, or what it is made of, in a bucket: s3://, gs://. All work goes on in a local folder.

The rooms:

    address   what a setting may name, and what of it may be shown
    bucket    one place in a bucket: list, put, get, create; with retries and without secrets in errors
    lease     one run at a time over a bucket, and taking over from a dead one
    mirror    the work folder and what is stored of it: pulled at the start, sent step by step, markers last
    growing   what the fetch appends to, stored in segments while it grows
    copies    inputs in a bucket → local copies
    place     what the pipeline sees of all this
"""
