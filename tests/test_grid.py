"""The Snakemake workflow with its local executor: a grid of two tiny runs."""

import os
import subprocess
import sys

import pytest

from staa import records
from staa.experiments import energy
from staa.items import parameters

SMALL = ["dataset=digits", "network=resnet19", "width=0.0625", "epochs=1", "image_size=8", "train_images=100"]


def snakemake(folder, *words, item="energy", config=SMALL):
    pytest.importorskip("snakemake", reason="no Snakemake: the workflow was not run (extra cluster)")
    file = str(records.ROOT / "workflow" / "Snakefile")
    return subprocess.run([sys.executable, "-m", "snakemake", "-s", file, item, "-j", "1", "--directory", str(folder),
                           *words, "--config", *config], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(records.ROOT), "STAA_RECORDS": str(folder / "records")})


def test_only_runs_without_a_record_start_and_a_failure_stops_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("STAA_RECORDS", str(tmp_path / "records"))
    staa_run, lif_run = energy(parameters(SMALL))
    place = records.folder("runs") / staa_run.name
    place.mkdir(parents=True)
    (place / "checkpoint.pt").write_bytes(b"damaged")
    locks = tmp_path / ".snakemake" / "locks"  # as a killed Snakemake leaves them
    locks.mkdir(parents=True)
    (locks / "0.output.lock").write_text(f"{records.folder('runs') / 'grid' / 'energy' / lif_run.name}\n")
    out = snakemake(tmp_path)
    assert out.returncode and "checkpoint" in out.stdout + out.stderr and "damaged" in out.stdout + out.stderr
    assert f"{staa_run.name}.log" in out.stdout + out.stderr
    assert not records.find(staa_run) and records.find(lif_run), "the other run went on"

    out = snakemake(tmp_path, "--dry-run")
    assert not out.returncode, out.stderr
    assert staa_run.name in out.stdout + out.stderr and lif_run.name not in out.stdout + out.stderr

    records.find(lif_run).save(tmp_path / "records" / f"{staa_run.name}.json")  # a vouched record counts as well
    (records.folder("runs") / lif_run.name / "record.json").unlink()  # and one that is deleted is made again
    out = snakemake(tmp_path, "--dry-run")
    assert not out.returncode and staa_run.name not in out.stdout + out.stderr
    assert lif_run.name in out.stdout + out.stderr


def test_the_sample_images_are_there_before_the_runs_that_see_them(tmp_path):
    """Each of which is a process of its own, perhaps on another machine."""
    out = snakemake(tmp_path, "--dry-run", item="table2", config=["network=resnet18", "neuron=lif"])
    assert not out.returncode and "resnet18-lif" in out.stdout + out.stderr, out.stderr
    assert sorted(path.name for path in (records.folder("data") / "digits64").iterdir()) == ["train", "val"]
