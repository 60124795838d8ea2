"""Grad-CAM on spikes (Figure 4): where a network looks, by depth.

    L = ReLU( sum_t sum_c a[t, c] S[t, c] ),   a[t, c] = mean over H x W of dY / dS[t, c]

S are the spikes of a layer, (T, C, H, W) for one recording, Y is the class's logit. The paper "aggregated" spiking maps
of four axes into maps of two, which we read as (T, C, H, W) and (H, W), and does not say how; that every time step has
its own weights, and that the sum over time comes before the ReLU, is our reading. Gradients pass the spikes as in
training, by eq. 5. Captum does Grad-CAM itself, on T x B maps.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from .firing import evaluating, neurons
from .networks import SpikingNetwork


def depths(network: SpikingNetwork, count: int = 5) -> dict[str, nn.Module]:
    """`count` spiking layers evenly spread over the depth, the last one among them, by "layer 2 of 10"."""
    layers = list(neurons(network).values())
    if not 1 <= count <= len(layers):
        raise ValueError(f"count must be between 1 and the network's {len(layers)} spiking layers, got {count}")
    places = [(i + 1) * len(layers) // count for i in range(count)]
    return {f"layer {place} of {len(layers)}": layers[place - 1] for place in places}


def maps(network: SpikingNetwork, x: Tensor, target: Tensor, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Grad-CAM (B, H, W) of each layer, at the size of the input: images (B, C, H, W) or frames (B, T, C, H, W).

    target: (B,) classes. layers: spiking layers of the network by label. The network stays as it is. Raises ValueError
    on a layer whose spikes have no places, as after a linear one.
    """
    from captum.attr import LayerGradCam

    found = {}
    for label, layer in layers.items():
        tap = nn.Identity()  # Captum takes the first axis for the batch: it sees time and batch together here
        with evaluating(network) as hooks:
            hook = layer.register_forward_hook(
                lambda module, inputs, spikes, tap=tap: tap(spikes.flatten(0, 1)).unflatten(0, spikes.shape[:2]))
            hooks.callback(hook.remove)
            cam = LayerGradCam(network, tap).attribute(x, target)  # (T B, 1, h, w)
        if cam.dim() != 4:
            raise ValueError(f"Grad-CAM takes layers whose spikes have places, (T, B, C, H, W); {label} has none")
        cam = cam.detach().unflatten(0, (-1, len(x))).sum(0).relu()  # (B, 1, h, w)
        found[label] = F.interpolate(cam, x.shape[-2:], mode="bilinear")[:, 0]
    return found


def share(cam: Tensor, mask: Tensor) -> Tensor:
    """How much of each map's mass lies on the object: cam (B, H, W), mask (B, H, W) bool; (B,) in [0, 1], NaN where a
    map is zero everywhere."""
    if cam.shape != mask.shape:
        raise ValueError(f"maps and masks must be of one shape, got {tuple(cam.shape)} and {tuple(mask.shape)}")
    return (cam * mask).sum((1, 2)) / cam.sum((1, 2))
