"""Child side: the heavy body of each stage, `run(job) -> dict`. The only place that imports torch.

Libraries read these variables when they are imported, so they are set before any job module is.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # jobs read local files only; downloads are the parent's business
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
os.environ.setdefault("TQDM_DISABLE", "1")  # bars fill the log; a job's progress comes from its events
# With fewer than 2, GPTQModel ends in "Virtual pool 'model_loader:cpu' requests 2 workers but parent 'cpu' only has 1".
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
