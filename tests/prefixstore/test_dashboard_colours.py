"""The dashboard's colours are distinct for colour-blind people, too."""

import itertools
import re
from importlib.resources import files

import numpy as np
import pytest

# How linear RGB looks without one kind of cone (Machado, Oliveira, Fernandes 2009).
SIGHTS = {
    "all cones": np.eye(3),
    "no red": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "no green": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "no blue": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = TO_XYZ.sum(axis=1)


def to_lab(colour: str, sight) -> np.ndarray:
    """CIELAB coordinates of a colour such as #0d4f9a, as it is seen."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(np.array(sight) @ linear, 0, 1) / WHITE
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_of_places_can_be_told_apart(scheme, sight) -> None:
    page_css = files("prefixstore.dashboard").joinpath("page/page.css").read_text()
    css = page_css.split("prefers-color-scheme: dark")[scheme == "dark"]
    places = ("device", "memory", "disk", "redis", "remote", "computed")
    seen = [
        to_lab(re.search(f"--{place}: (#[0-9a-f]{{6}})", css)[1], SIGHTS[sight]) for place in places
    ]
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
    assert len(distances) == 15
    assert min(distances) >= 17.5
