"""How the tests compile: both settings change how long it takes, not what is compiled."""

import os

# On two cores with two workers, a pool of compiling processes beside each of them only has to be started.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Inductor compiles a program for each instruction set to see whether it works; in a new cache's folder, again.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
