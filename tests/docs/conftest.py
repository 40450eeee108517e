"""The pages are written for the newest releases; transformers 4 has other names, and prints otherwise."""

import transformers

collect_ignore_glob = ["test_*.py"] if transformers.__version__ < "5" else []
