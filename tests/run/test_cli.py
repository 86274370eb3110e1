"""Flags and settings made from the fields of the configs."""

import argparse
import errno
import logging
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from almrr_ref import predict
from almrr_ref.config import ModelConfig, TrainConfig, make_configs
from almrr_ref.data.images import read_image
from almrr_ref.run.cli import (
    add_flags,
    add_max_pixels_flag,
    add_settings_flag,
    make_parser,
    pick_device,
    run_command,
    words_of,
)
from almrr_ref.run.text import LOGGER

VALUES = {
    "balance=false": False,
    "detach-reconstruction=True": True,
    "memory_weight=1": 1.0,
    "decoder_channels=(128, 192)": (128, 192),
    "parts=part=([0-9]+)": "part=([0-9]+)",
    "steps=9": 9,
}
COMPLAINTS = {
    "no_such_name=0.5": "reduced_channels, patch_size",
    "balance": "expected NAME=VALUE",
    "balance=0": "balance takes one bool, such as True; got '0'",
    "memory=True": "memory takes one int, such as 24000",
    "decoder_channels=[128, 192]": "decoder_channels takes one tuple",
    "steps=many": "steps takes one int; got 'many'",
}


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = make_parser("train", "")
    add_flags(parser, TrainConfig)
    add_flags(parser, ModelConfig)
    add_settings_flag(parser, ModelConfig, TrainConfig)
    return parser


def test_flags_come_from_the_fields_and_absent_ones_stay_absent(parser: argparse.ArgumentParser) -> None:
    flags = ["--blocks", "1", "2", "--steps", "9", "--no-amp", "--lr", "1e-3", "--encoder", "cnn3x3", "--tile", "64"]
    given = vars(parser.parse_args(flags))
    expected = {"blocks": [1, 2], "steps": 9, "amp": False, "lr": 1e-3, "encoder": "cnn3x3", "tile": 64}
    assert given == {**expected, "settings": []}
    assert make_configs("paper", given)[0].blocks == (1, 2)


@pytest.mark.parametrize("text", VALUES)
def test_a_setting_has_its_fields_type_and_wins_over_the_preset(parser: argparse.ArgumentParser, text: str) -> None:
    (_, depth), (name, value) = parser.parse_args(["--set", "depth=2", "--set", text]).settings
    assert (depth, value, type(value)) == (2, VALUES[text], type(VALUES[text]))
    assert VALUES[text] in [vars(config).get(name) for config in make_configs("plus", {name: value})]


@pytest.mark.parametrize("text", COMPLAINTS)
def test_a_setting_that_is_none_is_refused_in_one_line(
    parser: argparse.ArgumentParser, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--set", text])
    shown = capsys.readouterr().err
    assert COMPLAINTS[text] in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [
        ("auto", 0, "cpu"), ("cpu", 2, "cpu"), ("auto", 2, "cuda"), ("cuda", 2, "cuda"), ("cuda:1", 2, "cuda:1"),
        ("cuda:2", 2, "--device cuda:2: the last of the 2 GPUs here is cuda:1"), ("cuda:1", 0, "sees no CUDA GPU"),
        ("mps", 0, "--device is one of auto, cpu,"), ("gpu", 0, "--device is one of auto, cpu,"),
        ("cpu:1", 0, "--device is one of auto, cpu,"), ("cuda:x", 2, "--device is one of auto, cpu,"),
    ],
)  # fmt: skip
def test_a_device_is_picked_by_its_name_or_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, expected: str
) -> None:
    """On a machine with so many GPUs. Apple's have no float64, which folding and measuring need."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    if expected in ("cpu", "cuda", "cuda:1"):
        assert pick_device(name) == torch.device(expected)
    else:
        with pytest.raises(ValueError, match=expected):
            pick_device(name)


def test_what_a_command_was_given_is_given_again() -> None:
    given = ["--tile", "64", "--no-fuse", "--max-pixels", "99", "--no-maps"]
    parser, names = predict.build_parser(), ("tile", "dtype", "max_pixels", "device", "fuse", "no_overlays", "no_maps")
    parse = partial(parser.parse_args, [*given, "--checkpoint", "x.pt", "--input", "y", "--out", "z"])
    assert words_of(parse(), parser, *names) == ["--tile", "64", "--max-pixels", "99", "--no-fuse", "--no-maps"]


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_a_log_that_nobody_takes_ends_no_work(monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    def command(_: argparse.Namespace) -> int:
        with monkeypatch.context() as patch:
            for name in ("stdout", "stderr"):
                patch.setattr(sys, name, Mock(write=Mock(side_effect=OSError(errno.ENOSPC, "No space left"))))
            LOGGER.log(level, "trying again until it works")
        return 7

    assert run_command(command, make_parser("predict", ""), []) == 7


def test_max_pixels_limits_what_is_read_while_the_command_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(tmp_path / "x.png")
    parser, before = make_parser("predict", ""), Image.MAX_IMAGE_PIXELS
    add_max_pixels_flag(parser)

    def command(arguments: argparse.Namespace) -> int:
        return len(read_image(tmp_path / "x.png"))

    assert [run_command(command, parser, ["--max-pixels", limit]) for limit in ("34", "35")] == [2, 3]
    assert "more than 34 pixels (a decompression bomb?); --max-pixels raises the limit" in capsys.readouterr().err
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    "cause",
    [
        "DefaultCPUAllocator: can't allocate memory",
        "could not create a primitive",
        "Storage size calculation overflowed with sizes=[1000000000000000000, 96]",
    ],
)
def test_where_memory_is_short_a_command_names_only_flags_that_it_has(
    cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(_: argparse.Namespace) -> int:
        raise RuntimeError(cause)

    for flags in (["--batch-size", "--image-size"], ["--batch-size"], []):
        parser = make_parser("predict", "")
        for flag in flags:
            parser.add_argument(flag)
        assert run_command(command, parser, []) == 2
        remedy = f"; try a smaller {' or '.join(flags)}\n" if flags else ")\n"
        assert capsys.readouterr().err.endswith(remedy)
