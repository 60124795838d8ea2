"""A variant of the STAA neuron, another reading of what is lost: eq. 14 on a potential that leaks.

    Hm'[t-1] = V_reset + decay (Hm[t-1] - V_reset)                         (the leak of eq. 1)
    M[t]     = alpha sigmoid(W_2 ReLU(W_1 avgpool(Hm'[t-1] + X~[t])))      (eq. 12)
    U[t]     = M[t] Hm'[t-1] + N[t] X~[t],   N[t] = alpha - M[t]           (eqs. 6, 14)

Whether Hm has leaked when M weighs it is lost with eqs. 1, 6 and 14. `STAALIF` takes it as eq. 3 leaves it; for that
speaks that eq. 6 is introduced as a modification of eq. 1, one of whose fixed weights is the leak. What the text calls
Hm, "the membrane potential after a spike trigger at the previous time step", fits both. With M = N = 1 a layer of
`STAALIF` starts as a neuron without leak, where the plain LIF of the same networks keeps a quarter of its potential.
Here it starts as that LIF, and with decay = 1/4 never keeps more than half of Hm. Two things more are ours: that TSRD,
which the text calls "element-wise addition", adds Hm' too; and that PE on the membrane is added before the leak.
"""

from .attention import STAALIF
from .networks import NEURONS


class LeakySTAALIF(STAALIF):
    """`STAALIF` with Hm' in the place of Hm: in SA, in eq. 14 and where TSRD drops the aggregator. Without SA eq. 1, of
    which the leak is a part, mixes as before. decay: the weight of the leak, 0.25 as in `LIF`, with SA too."""

    leaky = True


NEURONS["staa-leaky"] = LeakySTAALIF
