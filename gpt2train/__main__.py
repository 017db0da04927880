"""`python -m gpt2train COMMAND …`, which is also how a rank is started."""

import sys

from gpt2train.cli import main

sys.exit(main())
