"""The networks that a request has beside its model, and how often their settings are given."""

from typing import Any

# A field of networks, the one of what they are shown, and those of their other settings.
_FIELDS = (
    ("controlnet", "control_image", "control_start", "control_end", "control_type"),
    ("ip_adapter", "ip_image", "ip_start", "ip_end", "ip_blocks", "ip_mask"),
)


def mistakes_of_networks(request: Any) -> dict[str, bool]:
    """Return messages for settings that are not given once for each network or once for all, and whether each holds."""
    mistakes = {}
    for network, image, *others in _FIELDS:
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
