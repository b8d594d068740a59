"""One of the processes that generate together: `python -m tests.parallel.two_processes INDEX COUNT ADDRESS`."""

import json
import sys

import jax

index, count, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, count, index)

import vecinfer_jax as vj  # noqa: E402
from tests import small  # noqa: E402
from tests.parallel import claims  # noqa: E402

method, calibration = claims.method_and_calibration(claims.TWO_PROCESSES)
found = []
for shape in ("2x2x1", "1x2x2"):
    out = vj.generate(
        claims.model(),
        small.prompts((150, 40, 7)),
        method=method,
        calibration=calibration,
        max_new_tokens=12,
        sampling=vj.Sampling(temperature=1.0),
        mesh=claims.layout_of(shape),
    )
    found.append(out.tokens)
print(json.dumps(found))
