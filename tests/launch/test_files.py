"""Shell scripts and the Dockerfile pass their linters; the image's pins fit together."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch_scripts import load

from olmo_jax.config import load_config

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "launch" / "docker"


def lint(name: str, *files: Path) -> None:
    program = shutil.which(name, path=str(Path(sys.executable).parent)) or name
    done = subprocess.run([program, *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shell_scripts_pass_shellcheck():
    scripts = [*(ROOT / "launch").glob("*.sh"), ROOT / ".ci" / "run"]
    assert len(scripts) >= 3
    lint("shellcheck", *scripts)


def test_the_dockerfile_passes_hadolint():
    lint("hadolint", DOCKER / "Dockerfile")


def test_what_the_dockerfile_copies_is_there():
    kept = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    for line in kept:
        if line.startswith("!"):
            assert (ROOT / line[1:]).exists(), f"{line[1:]} is not in the checkout"


def test_every_command_of_the_pages_is_taken(monkeypatch, capsys):
    """The scripts' by their dry runs, and what they hand on by the configuration's reader."""
    monkeypatch.chdir(ROOT)
    trained = []
    for page in sorted((ROOT / "launch").glob("*.md")):
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line)
                if words[:1] == ["python"]:
                    at = words.index("--")
                    assert load(Path(words[1]).stem).main([*words[2:at], "--dry_run", "--"]) == 0
                    trained.append(words[at + 1 :])
                elif words[:1] == ["sbatch"]:
                    trained.append(words[words.index("launch/slurm.sh") + 1 :])
    assert len(trained) == 4
    capsys.readouterr()
    for arguments in trained:
        files = [a.removeprefix("--gin_file=") for a in arguments if a.startswith("--gin_file=")]
        bindings = [a.removeprefix("--gin.") for a in arguments if a.startswith("--gin.")]
        assert len(files) == 1 and len(files) + len(bindings) == len(arguments)
        assert load_config(files, bindings).train.run_dir is not None


@pytest.mark.slow
def test_the_image_can_be_installed_and_all_of_it_is_pinned(tmp_path):
    """pip's own answer to the Dockerfile's commands, for both kinds at once, without installing."""
    (make_pins,) = re.findall(r"RUN (awk .*?) > pins.txt", (DOCKER / "Dockerfile").read_text())
    file = tmp_path / "pins.txt"
    file.write_bytes(subprocess.check_output(make_pins, shell=True, cwd=ROOT))
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    done = subprocess.run(
        [*command, f"--constraint={file}", ".[tpu,cuda,remote]"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (li for li in done.stdout.splitlines() if li.startswith("Would install"))
    installed = [word.rpartition("-")[::2] for word in line.split()[2:]]
    assert len(installed) > 50
    pinned = {normal(li.partition("==")[0]) for li in file.read_text().splitlines() if "==" in li}
    missing = [f"{n}=={v}" for n, v in installed if normal(n) not in pinned | {"olmo-jax"}]
    assert not missing, f"launch/docker/constraints.txt lacks {missing}"


def normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
