"""Every test runs offline and on one thread."""

from __future__ import annotations

import os
import signal

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as in a terminal, also where the tests were started by nohup

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402  (the variables above are read at import)

torch.set_num_threads(1)
