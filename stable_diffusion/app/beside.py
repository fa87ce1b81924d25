"""The ControlNets and IP-Adapters of a request, and their settings: one value for each network, or one for all."""

from itertools import cycle
from typing import Any

# A field of networks -> {argument of ``Control`` or ``ImagePrompt``: field of the setting}; the input image is first.
_FIELDS = {
    "controlnet": {"image": "control_image", "start": "control_start", "end": "control_end", "kind": "control_type"},
    "ip_adapter": {"image": "ip_image", "start": "ip_start", "end": "ip_end", "scales": "ip_blocks", "mask": "ip_mask"},
}


def mistakes_of_networks(request: Any) -> dict[str, bool]:
    """Return {message: whether it applies} for settings that need one value for each network, or one for all."""
    mistakes = {}
    for network, fields in _FIELDS.items():
        image, *others = fields.values()
        count, images = len(getattr(request, network)), len(getattr(request, image))
        each = f"once for each {network}, or once for all"
        mistakes |= {
            f"{image} needs {network}: an id, a folder or a file": images > 0 and not count,
            f"{image} is needed {each}": count > 0 and images not in (1, count),
            f"{', '.join(others[:-1])} and {others[-1]} are given {each}": (
                not {len(getattr(request, name)) for name in others} <= {0, 1, count}
            ),
        }
    return mistakes


def settings_of_networks(request: Any, network: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the source of each network of a field, with its settings other than defaults."""
    fields = _FIELDS[network].items()
    given = {name: cycle(values) for name, field in fields if (values := getattr(request, field))}
    return [
        (source, {"scale": scale} | {name: next(values) for name, values in given.items()})
        for source, scale in getattr(request, network)
    ]
