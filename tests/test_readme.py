# SPDX-License-Identifier: Apache-2.0
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def model_folder(text_model_folder, tmp_path) -> Path:
    """A copy: what an example stores goes beside it."""
    return shutil.copytree(text_model_folder, tmp_path / "model")


def made_real(code: str, folder: Path) -> str:
    """An example with real places, a long prompt, and no token types."""
    code = code.replace("path/or/hub-name", str(folder))
    code = code.replace("~/kv", str(folder.parent / "kv"))
    code = code.replace('"a very long prompt ..."', '"a very long prompt " * 20')
    # token_type_ids are the tokenizer's idea, not the model's
    return code.replace('return_tensors="pt"', 'return_tensors="pt", return_token_type_ids=False')


def test_restoring_a_prompt_works_as_written(tmp_path, model_folder):
    """The first example computes and stores; run again, it restores and gives the same output."""
    (code,) = [block for block in BLOCKS if "PrefixCache" in block]
    code = made_real(code, model_folder)
    code += "    print(output.tolist(), store.stats().hit_blocks)"  # inside the with block
    first, second = (run(code, tmp_path).split("]] ") for _ in range(2))
    assert first[0] == second[0]
    assert (int(first[1]), int(second[1])) == (0, 5)


def test_decoding_out_of_a_store_works_as_written(tmp_path, model_folder):
    """After the first example: the prompt is restored, and more is decoded."""
    (restore,) = [block for block in BLOCKS if "PrefixCache" in block]
    (tiered,) = [block for block in BLOCKS if "TieredCache" in block]
    code = made_real(restore + tiered, model_folder)
    code += "    print(cache.num_tokens, cache.steps)"
    lines = run(code, tmp_path).splitlines()
    total = int(lines[0].split()[1])
    assert lines[0].split()[0] == "256"  # the first record, restored
    assert lines[-1] == f"{total + 64} 64"


def test_evicting_works_as_written(tmp_path, model_folder):
    """The cache of the first example holds a quarter; that of the second is stored and found."""
    evict, store = [block for block in BLOCKS if "KVCache" in block]
    code = made_real(evict + store, model_folder)
    code += "    print(again.num_columns, again.layer_kv(0).lengths, again.method)"
    lines = run(code, tmp_path).splitlines()
    assert int(lines[0].split()[0]) < 3 * 380 * 160  # 3 layers, 380 tokens and their K and V
    assert lines[-1] == "443 (95, 95) h2o:budget=0.25,recent=0.5,prefill=dense"


def test_a_conversation_works_as_written(tmp_path, model_folder):
    """Its question is answered from the cache of one episode."""
    evict, _ = [block for block in BLOCKS if "KVCache" in block]
    (code,) = [block for block in BLOCKS if "EpisodicCache" in block]
    code = made_real(evict + code, model_folder)
    code += "print(len(conversation.episodes), output.shape[1] - ask.input_ids.shape[1])"
    assert run(code, tmp_path).splitlines()[-1] == "1 16"


def test_calibrating_works_as_written(tmp_path, model_folder):
    """The command of README, with fewer random tokens."""
    run_line("calibrate razor", " --block 40 --draws 1", tmp_path, model_folder)
    assert (tmp_path / "razor.safetensors").exists()


def test_codecs_work_as_written(tmp_path, model_folder):
    """A profile is made and used, on fewer and shorter texts."""
    sizes = " --tokens 100 --following 50"
    run_line("calibrate codec", sizes + " --documents 9 --group 2", tmp_path, model_folder)
    options = sizes + " --record 64 --documents topics --timed 1 --repeats 1 --methods exact"
    out = run_line("bench codec", options, tmp_path, model_folder)
    assert (tmp_path / "codec-report" / "report.html").exists()
    assert "kvlc:preset=archive" in out


def run_line(command, options, folder, model):
    """The command of README that begins so, on a model and with more options."""
    (line,) = re.findall(rf"^kvlib ({command} .*)$", README, flags=re.MULTILINE)
    line = line.replace("path/to/model", str(model)) + options
    command = [sys.executable, "-c", "from kvlib.cli import main; main()", *shlex.split(line)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_storing_blocks_works_as_written(tmp_path):
    """The second example finds the ten blocks it stored, with the codec's fidelity."""
    (code,) = [block for block in BLOCKS if "random_block" in block]
    assert run(code, tmp_path).startswith("10 int8@1:group=64 ")


@pytest.mark.parametrize("target", re.findall(r"^make (\S+)", README, flags=re.MULTILINE))
def test_make_targets_exist(target):
    """README's commands are targets of the Makefile."""
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_measuring_works_as_written(tmp_path, model_folder):
    """The lines of `kvlib eval`: a grid on a tiny model, and the comparison of two methods."""
    shells = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    (block,) = [shell for shell in shells if "kvlib eval" in shell]
    lines = block.replace("\\\n", " ").splitlines()
    lines = [line.partition("#")[0].strip() for line in lines if line.startswith("kvlib eval")]
    assert len(lines) == 3
    for line in lines:
        small = line.replace("path/to/model", str(model_folder)).replace("4096", "2100")
        small = small.replace("--contexts 20", "--contexts 2 --workers 1")
        small = small.replace("--profile smoke", "--profile smoke --contexts 1")
        command = [
            sys.executable,
            "-c",
            "from kvlib.cli import main; main()",
            *shlex.split(small)[1:],
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "records, 2,100 tokens: 10 questions, 2 contexts" in done.stdout
    assert "second - first" in done.stdout
    assert (tmp_path / "smoke" / "report.html").exists()
