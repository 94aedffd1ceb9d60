"""The benchmarks' own arithmetic, and that they run; not what they measure."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import record, summary, tables
from benchmarks.settings import SUITES, Settings

from bytelm.version import __version__

ROOT = Path(__file__).parents[1]


def samples(*cpu, wall=2.0):
    """Samples with these CPU times, and wall times some times as long."""
    return [{"cpu": time, "wall": wall * time} for time in cpu]


def run_of(**settings):
    return {
        "command": "python -m benchmarks",
        "settings": asdict(Settings(**settings)),
        "commit": "0123456789abcdef",
        "dirty": False,
        "versions": {"python": "3.11", "bytelm": "0.1"},
        "system": "Linux x86_64",
        "processor": "A processor",
        "threads": 1,
    }


def section(results, **settings):
    return {"run": run_of(**settings), "seconds": 1.0, "results": results}


def model_results():
    def measurement(num_bytes, name, **times):
        flops = {"flops": 4e9 * num_bytes, "patches": num_bytes // 4}
        return {"bytes": num_bytes, "pass": name, "samples": times, **flops}

    return {
        "parameters": 31_000_000,
        "matmul": {"shape": [4, 5, 6], "flops": 8e9, "samples": samples(1.0, 2.0)},
        "gaps": {"1": 2e-5},
        "measurements": [
            measurement(1, "forward", ours=samples(2, 4, 3), theirs=samples(5, 6, 9)),
            measurement(2, "forward", ours=samples(5, 4, 6)),
        ],
    }


EXAMPLES = {
    "model": model_results(),
    "cross-attention": {
        "measurements": [
            {
                "layer": "decoder",
                "bytes": 2048,
                "samples": {
                    "ours": samples(1),
                    "theirs": samples(2),
                    "theirs, with its mask": samples(3),
                },
            }
        ]
    },
    "generation": {
        "measurements": [
            {
                "prompt_bytes": 255,
                "patch_size": 4.0,
                "new_bytes": 256,
                "their_bytes": 16,
                "same_bytes": 16,
                "samples": {"prefill": samples(1), "steps": samples(7), "theirs": samples(4)},
            }
        ]
    },
    "engine": {
        "prompt_bytes": 128,
        "new_bytes": 64,
        "patch_size": 4.0,
        "measurements": [
            {
                "subject": name,
                "requests": requests,
                "same": [2, 2],
                "bytes": requests * 65,
                "samples": {"prompts": samples(1.0), "steps": samples(steps)},
            }
            for name, requests, steps in (("sessions", 2, 4.0), ("engine", 16, 8.0))
        ]
        + [
            {
                "subject": "engine",
                "requests": 1,
                "kind": "drafts",
                "same": [1, 1],
                "bytes": 80,
                "made": 72,
                "stats": {
                    "num_drafted": 30,
                    "num_accepted": 20,
                    "bytes_generated": 80,
                    "bytes_moved": 160e6,
                    "passes": {"scorer": 40, "global_model": 20},
                },
                "samples": {"prompts": samples(1.0), "steps": samples(1.0)},
            }
        ],
        "first_bytes": [
            {
                "busy": 16,
                "prompt_bytes": 16,
                "long_bytes": 2048,
                "num_steps": [1, 3],
                "samples": {"step": samples(2, 1), "first": samples(4, 3)},
            }
        ],
    },
    "memory": {
        "measurements": [
            {"bytes": 4096, "pass": "forward", "peak_bytes": {"ours": 2**20, "theirs": 3 * 2**20}},
            {"bytes": 8192, "pass": "forward", "peak_bytes": {"ours": 2**21}},
        ]
    },
    "scorer": {
        "measurements": [
            {
                "scorer": "a table",
                "way": "a whole row",
                "bytes": 1000,
                "samples": {"ours": samples(0.5), "theirs": samples(2.0)},
            }
        ]
    },
    "data": {
        "measurements": [
            {"what": "loader", "bytes": 2_000_000, "rows": 10, "samples": {"ours": samples(4)}},
            {
                "what": "recipe",
                "bytes": 2_000_000,
                "rows": 10,
                "samples": {"ours": samples(4), "training": samples(80)},
            },
        ],
        "workers": [
            {
                "scorer": "n-grams",
                "bytes": 2_000_000,
                "samples": {"one": samples(8, 6), "two": samples(4, 4)},
            }
        ],
    },
}


def example_record():
    sections = {name: section(results) for name, results in EXAMPLES.items()}
    return {"format": 1, "date": "2026-11-23", "sections": sections}


def cells(text, *beginning):
    """The cells of the first table row that begins with these."""
    wanted = "| " + " | ".join(beginning) + " |"
    (line, *_) = [line for line in text.splitlines() if line.startswith(wanted)]
    return [cell.strip() for cell in line.strip("|").split("|")][len(beginning) :]


def test_a_ratio_is_the_median_over_pairs_of_neighbours():
    ours, theirs = samples(2, 4, 3), samples(5, 6, 9)
    assert summary.pair_ratio(ours, theirs, "cpu") == (2.5, 1.5, 3.0)
    assert summary.pair_ratio(ours, theirs, "cpu", scale=2.0) == (5.0, 3.0, 6.0)
    assert summary.minimum(theirs, "wall") == 10
    assert summary.median(ours, "cpu") == 3
    with pytest.raises(ValueError, match="zip"):
        summary.pair_ratio(ours, theirs[:2], "cpu")


def test_tables_say_what_the_samples_say():
    text = tables.draw(example_record())
    assert text.count("Commit 0123456789ab;") == 1
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(SUITES)
    # Minimum / median, and the ratio of neighbours with its spread.
    expected = ["2 s / 3 s", "5 s / 6 s", "**2.5** (1.5 to 3)"]
    assert cells(text, "forward", "1") == expected
    assert cells(text, "forward", "2") == ["4 s / 5 s", "", ""]
    assert cells(text, "forward", "1 to 2") == ["2.00", ""]
    # 4 GFLOP in 2 s, beside 8 GFLOP in 1 s.
    assert cells(text, "forward", "1", "1.00") == ["4000.0", "2.0", "25%"]
    assert cells(text, "decoder", "2,048")[-1] == "**3** (3 to 3)"
    # 256 bytes in 1 + 7 s; 16 in 4 s.
    generated = ["4.00", "1 s / 1 s", "36.6", "4.00", "**8** (8 to 8)"]
    assert cells(text, "255") == generated
    # 16 x 64 bytes in 8 s and 2 x 64 in 4 s; with the prompts in 9 s and 5 s.
    assert cells(text, "sessions, one by one") == ["32.0", "1 s / 1 s", "", ""]
    expected = ["128.0", "1 s / 1 s", "**4** (4 to 4)", "**4.44** (4.44 to 4.44)"]
    assert cells(text, "engine, 16 at once") == expected
    # 72 bytes in 1 s.
    assert cells(text, "engine, 1 at once, drafts")[0] == "72.0"
    assert "20 of 30 drafted" in text
    assert "scorer 0.50, global model 0.25; 2.0 MB of weights per byte" in text
    assert cells(text, "16", "2,048", "1 to 3")[-1] == "**2.5** (2 to 3)"
    assert cells(text, "forward", "4,096") == ["1", "3", "**3.00**"]
    assert cells(text, "forward", "8,192") == ["2", "", ""]
    assert cells(text, "a table", "a whole row") == ["2,000", "500", "**4** (4 to 4)"]
    assert cells(text, "loader") == ["4 s / 4 s", "0.50", "2.5", ""]
    assert cells(text, "recipe") == ["4 s / 4 s", "0.50", "2.5", "**20** (20 to 20)"]
    expected = ["12 s / 14 s", "8 s / 8 s", "**1.75** (1.5 to 2)"]
    assert cells(text, "n-grams", "2") == expected


def test_origins_are_told_apart_where_they_differ():
    mixed = example_record()
    mixed["sections"]["data"]["run"]["commit"] = "fedcba9876543210"
    text = tables.draw(mixed)
    assert text.count("Commit 0123456789ab;") == 6
    assert text.count("Commit fedcba987654;") == 1


def test_a_suite_that_is_run_again_replaces_its_own_section_alone(tmp_path):
    path = record.record_path(tmp_path / "records", Settings(), date(2026, 11, 23))
    assert path.name == "2026-11-23-cpu.json"
    record.update(path, "data", section(EXAMPLES["data"]))
    record.update(path, "memory", section(EXAMPLES["memory"]))
    again = section({"note": "skipped", "measurements": []})
    record.update(path, "memory", again)
    sections = json.loads(path.read_text())["sections"]
    assert sections == {"data": section(EXAMPLES["data"]), "memory": again}
    assert "skipped" in path.with_suffix(".md").read_text()

    path.with_suffix(".md").unlink()
    assert "loader" in record.redraw(path).read_text()


def test_quick_and_low_precision_runs_stand_apart():
    quick = Settings(quick=True, device="cuda")
    path = record.record_path(Path(), quick, date(2026, 11, 23))
    assert path.name == "2026-11-23-cuda-quick.json"
    assert record.section_name("model", Settings()) == "model"
    assert record.section_name("model", Settings(precision="bfloat16")) == "model, bfloat16"
    low = example_record()
    low["sections"]["model, bfloat16"] = section(model_results(), precision="bfloat16")
    assert "ours in bfloat16" in tables.draw(low)


def test_records_name_no_folders():
    inner = "src/bytelm/model/blt.py"
    text = f'File "{ROOT}/{inner}", ork/{inner}:3 --out /a/b/c 5 bytes/s, a / b, http://d.org/e/f'
    expected = f'File "{inner}", {inner}:3 --out c 5 bytes/s, a / b, http://d.org/e/f'
    assert record.scrubbed(text) == expected


def run(module, *arguments):
    command = [sys.executable, "-m", module, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.slow
def test_the_runner_measures_records_and_draws(tmp_path):
    run("benchmarks", "--quick", "--suite", "model,cross-attention", "--out", tmp_path)
    run("benchmarks", "--quick", "--suite", "generation,engine,data,scorer", "--out", tmp_path)
    (path,) = tmp_path.glob("*.json")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-cpu-quick.json", path.name)
    sections = json.loads(path.read_text())["sections"]
    assert list(sections) == ["model", "cross-attention", "generation", "engine", "data", "scorer"]
    for found in sections.values():
        described = found["run"]
        assert described["versions"].keys() == {"python", "bytelm", "torch", "transformers"}
        assert described["versions"]["bytelm"] == __version__
        assert {"commit", "dirty", "processor", "threads", "settings"} <= described.keys()
        assert found["results"]["measurements"]
    assert "--suite model,cross-attention" in sections["model"]["run"]["command"]
    assert str(tmp_path) not in path.read_text()
    both = [m["samples"] for m in sections["model"]["results"]["measurements"]]
    assert all(len(one["ours"]) == len(one["theirs"]) == 1 for one in both)

    drawn = path.with_suffix(".md").read_text()
    path.with_suffix(".md").write_text("")
    run("benchmarks", "--redraw", path)
    assert path.with_suffix(".md").read_text() == drawn
    assert "## generation" in drawn


def test_a_wrong_option_is_named():
    command = [sys.executable, "-m", "benchmarks", "--suite", "model,modle"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "modle" in result.stderr


@pytest.mark.slow
def test_the_gpu_script_runs_on_a_cpu_with_tiny_models(tmp_path):
    parts = ["hardware", "parity", "training", "large", "suites"]
    options = ["--device", "cpu", "--tiny", "--parts", ",".join(parts)]
    run("benchmarks.gpu", "--out", tmp_path, *options)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found["parts"]) == parts
    assert str(ROOT) not in (tmp_path / "gpu.json").read_text()
    for name, part in found["parts"].items():
        assert part["status"] == 0, (name, part["output"])
        assert not part["timed_out"]
        assert not [key for key in part.get("findings", {}) if "error" in key], part
    findings = {name: found["parts"][name].get("findings") for name in parts}
    for label, outputs in findings["parity"].items():
        if label.endswith(", float32"):
            assert all(one["fast - twin"] < 1e-4 for one in outputs.values()), label
    assert findings["training"]["compiled"]["FLOP/s"] > 0
    assert findings["large"]["entropy patches"]["bytes/s that memory allows"] > 0
    assert list(tmp_path.glob("*-cpu-quick.md"))


@pytest.mark.slow
def test_a_part_of_the_gpu_script_that_takes_too_long_is_stopped():
    from benchmarks.gpu import run_command

    ended = run_command([sys.executable, "-c", "print('begun', flush=True); input()"], 0.0)
    assert ended["timed_out"]
    ended = run_command([sys.executable, "-c", "print('begun')"], 60.0)
    assert (ended["status"], ended["output"]) == (0, "begun\n")
