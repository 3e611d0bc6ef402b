"""Measures what storing the state of a training costs: seconds, its share of the training time, and bytes.

Command: python benchmarks/checkpoints.py
Takes: half a minute on two cores. No data: the images are noise, which costs the same.

A state is taken and written, synced and renamed, after a few updates of each recipe; the share is that of one every
`--checkpoint-every` seconds, as the recipe has it.
"""

import tempfile
import time
from pathlib import Path

import torch
from record import over_repeats, write_result

from dynaconv.arguments import parse_training
from dynaconv.data.images import ImageSet
from dynaconv.device import keep_freed_memory, use_threads
from dynaconv.recipe import parse_duration, with_settings
from dynaconv.rundir import RunDir
from dynaconv.training.fit import fit
from dynaconv.training.start import build_model, training_batches
from dynaconv.training.state import State

RECIPES, REPEATS, BATCHES = ("fast92", "coursework"), 15, 3
CPU = torch.device("cpu")


def main() -> None:
    keep_freed_memory()
    use_threads(0)
    print(write_result("checkpoints", {name: measure(name) for name in RECIPES}))


def measure(name: str) -> dict[str, object]:
    recipe, _ = parse_training([name])
    recipe = with_settings(recipe, epochs=1)
    generator = torch.Generator().manual_seed(0)
    count = BATCHES * recipe.train.batch_size
    noise = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    images = ImageSet(noise, torch.arange(count) % 10, tuple("abcdefghij"), "noise")
    model = build_model(recipe, images, CPU)
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir.create(Path(folder) / "run")
        run.write_weights(model.state_dict())

        def keep(take) -> None:
            if len(seconds) >= REPEATS:
                return
            for _ in range(REPEATS):
                started = time.perf_counter()
                state: State = take()
                run.write_state(state.tensors, {**state.facts, "train_seconds": 0.0})
                seconds.append(time.perf_counter() - started)

        fit(model, training_batches(recipe, images), [], recipe, CPU, keep=keep)
        states = [path.stat().st_size for path in (run.path / "state").iterdir()]
        weights = (run.path / "model.safetensors").stat().st_size
    median = sorted(seconds)[len(seconds) // 2]
    every = parse_duration(recipe.train.checkpoint_every)
    return {
        "seconds": over_repeats(seconds),
        "share_of_training": {"value": median / every},
        "every_seconds": {"value": every},
        "bytes_of_weights": {"value": weights},
        "bytes_of_states": {"value": sum(states)},
        "states_over_weights": {"value": sum(states) / weights},
        "one_state_over_weights": {"value": max(states) / weights},
    }


if __name__ == "__main__":
    main()
