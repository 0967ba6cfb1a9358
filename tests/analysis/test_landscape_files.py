"""Files of landscapes: bytes, interruptions, kills, and files of something else."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from child_processes import jobs, until
from dense import classes, perceptron
from planes import small_plane
from torch import Tensor, nn

from hvpfast.analysis import landscape
from hvpfast.analysis.landscape.losses import Losses

pytestmark = pytest.mark.usefixtures("single_threaded")

LOSS = nn.CrossEntropyLoss()


def test_files_hold_everything_and_only_the_settings_decide_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plane.npz"
    found = small_plane(path)
    stored = landscape.load(path)
    for name in ("losses", "done", "x", "y", "directions"):
        assert torch.equal(getattr(found, name), getattr(stored, name))
    assert stored.settings == found.settings
    assert stored.center_loss == found.center_loss
    assert (stored.seed, stored.unit) == (5, found.unit)
    small_plane(tmp_path / "other.npz", save_every=100.0)
    assert path.read_bytes() == (tmp_path / "other.npz").read_bytes()
    found.save(tmp_path / "saved.npz")
    assert path.read_bytes() == (tmp_path / "saved.npz").read_bytes()
    with np.load(path) as archive:
        assert archive["losses"].shape == (6, 6)
    line = tmp_path / "line.npz"
    landscape.line(perceptron(), LOSS, None, classes(8, 4), seed=1, num_points=3, path=line)
    assert landscape.load(line).y is None


class Stopped(Exception):
    pass


@pytest.mark.parametrize("calls", [1, 3, 8])
def test_interrupted_planes_go_on(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, path = tmp_path / "whole.npz", tmp_path / "part.npz"
    small_plane(whole)
    evaluate, left = Losses.__call__, [calls]

    def limited(self: Losses, points: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise Stopped
        return evaluate(self, points)

    monkeypatch.setattr(Losses, "__call__", limited)
    with pytest.raises(Stopped):
        small_plane(path)
    if calls > 1:
        partial = landscape.load(path)
        assert int(partial.done.sum()) == 5 * (calls - 1)
        assert bool(partial.losses[~partial.done].isnan().all())
        assert not partial.overflow.any()
        with pytest.raises(ValueError, match="not evaluated"):
            landscape.contour(partial)
    left[0] = 10**6
    small_plane(path, seed=5 if calls < 8 else None)  # the seed is that of the file
    assert path.read_bytes() == whole.read_bytes()
    left[0] = 0
    assert small_plane(path).complete  # nothing is evaluated


JOB = """
from dense import classes, perceptron
from hvpfast import landscape
def job(path):
    landscape.plane(perceptron(), torch.nn.CrossEntropyLoss(), None, classes(2000, 4), seed=1,
                    num_points=40, points_at_once=20, save_every=0.0, path=path)
"""


def newer(path: Path, seen: Tensor) -> bool:
    """Whether the file holds more points than were seen."""
    return int(landscape.load(path).done.sum()) > int(seen.sum())


def test_killed_at_any_moment_the_file_ends_up_the_same(tmp_path: Path) -> None:
    whole, path, chance = tmp_path / "whole.npz", tmp_path / "killed.npz", random.Random(0)
    done = [0]
    with jobs(JOB) as killable:
        killable.start(whole)
        assert killable.wait() == 0
        for _ in range(5):
            before = landscape.load(path).done if path.exists() else torch.zeros(1)
            job = killable.start(path)
            until(lambda seen=before: path.exists() and newer(path, seen))
            time.sleep(0.02 * chance.random())
            killable.kill(job)
            done.append(int(landscape.load(path).done.sum()))  # always a whole file
            assert done[-2] < done[-1] < 1600
        killable.start(path)
        assert killable.wait() == 0
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed.npz", "whole.npz"]


def test_files_of_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plane.npz"
    small_plane(path)
    content = path.read_bytes()
    for options, message in (
        ({"seed": 6}, "seed is 5, asked for 6"),
        ({"normalize": "layer"}, "normalize is 'filter', asked for 'layer'"),
        ({"num_points": 7}, "other grid"),
        ({"span": 2.0}, "other grid"),
        ({"dtype": torch.float32}, "dtype is"),
        ({"ignore": "norm"}, "still is"),
        ({"points_at_once": 4}, "points_at_once is 5, asked for 4"),
    ):
        with pytest.raises(ValueError, match=message):
            small_plane(path, **options)
    with pytest.raises(ValueError, match=r"other directions; other parameters\. Choose another"):
        landscape.plane(perceptron(1), LOSS, None, classes(8, 4), seed=5, num_points=6,
                        points_at_once=5, path=path)  # fmt: skip
    with pytest.raises(ValueError, match="another landscape: other data"):
        landscape.plane(perceptron(), LOSS, None, classes(8, 4, seed=2), seed=5, num_points=6,
                        points_at_once=5, path=path)  # fmt: skip
    assert path.read_bytes() == content
    path.write_bytes(content[:300])
    with pytest.raises(ValueError, match="is damaged"):
        small_plane(path)
    np.savez(path, a=1)
    with pytest.raises(ValueError, match="not a landscape"):
        landscape.load(path)
    with pytest.raises(FileNotFoundError):
        landscape.load(tmp_path / "none.npz")
