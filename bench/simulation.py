"""How many simulated anomalies one core makes: ``python bench/simulation.py``.

Every image gets an anomaly (training leaves half of them clean, which doubles the rate). 256x256 pixels, one thread.
"""

import statistics
import tempfile
import time
from pathlib import Path

import common  # noqa: F401 (finds the package in a checkout)
import numpy as np
import torch
from PIL import Image

from almrr_ref.anomalies import textured_anomaly
from almrr_ref.data.samples import training_sample
from almrr_ref.data.textures import ImageTextures, TextureFolder
from almrr_ref.demo.surfaces import TEXTURES, render


def main(repeats: int = 15, count: int = 30) -> None:
    torch.set_num_threads(1)
    pictures = [render(name, 256, np.random.default_rng(i)) for i, name in enumerate(4 * list(TEXTURES))]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    with tempfile.TemporaryDirectory() as folder:
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(Path(folder) / f"{i}.png")
        for source in (TextureFolder(folder, 256), ImageTextures(images)):
            generator = torch.Generator().manual_seed(0)
            rates = []
            for _ in range(repeats):
                start = time.perf_counter()
                for i in range(count):
                    training_sample(images[i % 8].float() / 255, source, generator, 0.0, textured_anomaly)
                rates.append(count / (time.perf_counter() - start))
            p20, *_, p80 = statistics.quantiles(rates, n=5)
            name = type(source).__name__
            print(f"{name:14} median {statistics.median(rates):.0f} images/s (p20 {p20:.0f}, p80 {p80:.0f})")


if __name__ == "__main__":
    main()
