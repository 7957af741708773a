"""What a user types wrong, may not see or has lying in the way: said at once, with the next command, without a
network.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.files import read_json
from launcher.image.squashfs_file import sidecar_path
from launcher.stage import hub as hub_module
from launcher.stage import inventory
from launcher.stage.image import stage_image
from tests.conftest import Launch
from tests.stage.hub_server import Hub
from tests.stage.stage_image import image_bytes, source
from tests.stage.test_stage_c4 import stage_c4, train

assert source  # the fixture
NO_HUB = "http://127.0.0.1:9"  # nobody answers


@contextmanager
def closed(folder: Path) -> Iterator[Path]:
    """`folder` where this user may not look."""
    folder.mkdir()
    root = os.geteuid() == 0
    folder.chmod(0)
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o700)


C4 = ("c4", "--to", "d")


@pytest.mark.parametrize(
    ("status", "words", "arguments"),
    [
        (2, "one of --files N, --for RUN and --all", C4),
        (2, "one of --files N, --for RUN and --all", (*C4, "--files", "2", "--all")),
        (2, "cannot be combined with --from", (*C4, "--all", "--from", "s3://b/c", "--revision", "v9")),
        (2, "--jobs", (*C4, "--files", "1", "--jobs", "0")),
        (3, "C4 has 1024 train files", (*C4, "--files", "0")),
        (3, "--files N, from 1 to 1024", (*C4, "--files", "5000")),
        (7, "cannot read", (*C4, "--for", "")),
        (4, "cannot read", (*C4, "--for", "no-such.toml")),
        (3, "each once", (*C4, "--for", "nodes=17,nodes=18")),
        (3, "'gpu=4' is not one of nodes=N", (*C4, "--for", "nodes=3,gpu=4")),
        (3, "'nodes=0'", (*C4, "--for", "nodes=0")),
        (3, "4 GPUs cannot be divided into groups of 3", (*C4, "--for", "nodes=1,gpus=4,tp=3")),
        (3, "file", (*C4, "--for", "file")),
        (3, "file: a file, not a directory", ("c4", "--to", "file", "--files", "1")),
        (3, "file: a file, not a directory", ("c4", "--to", "file/c4", "--files", "1")),
        (2, "the path is empty", ("c4", "--to", "", "--files", "1")),
        (3, "file: a file, not a directory", ("tokenizer", "--to", "file")),
        (3, "theirs: holds other data (thesis.tex)", ("c4", "--to", "theirs", "--files", "1")),
        (3, "theirs: holds other data", ("c4", "--to", "theirs", "--files", "1", "--dry-run")),
        (3, "theirs: holds other data", ("tokenizer", "--to", "theirs")),
        (3, "theirs: holds other data", ("model", "--to", "theirs")),
        (3, "file: a file, not a directory", ("verify", "file")),
        (4, "nothere: no such directory", ("list", "nothere")),
        (3, "name a .sqsh file or its http(s) address", ("image", "s3://bucket/x.sqsh", "--to", "d")),
        (2, "one of SOURCE and --release TAG is needed", ("image", "", "--to", "d")),
        (3, "'nosuchfile': no such file", ("image", "nosuchfile", "--to", "d")),
        (3, "'folder': no such file", ("image", "folder", "--to", "d")),
    ],
)
def test_refused_before_any_connection(status: int, words: str, arguments, launch: Launch, workplace: Path) -> None:
    (workplace / "file").write_text("mine")
    (workplace / "folder").mkdir()
    (workplace / "theirs").mkdir()
    (workplace / "theirs" / "thesis.tex").write_text("mine")
    done = launch("stage", *arguments, HF_ENDPOINT=NO_HUB)
    said = " ".join(done.stderr.split())
    assert (done.returncode, words in said) == (status, True) and "no connection" not in said, said
    assert not (workplace / "d").exists() and os.listdir(workplace / "theirs") == ["thesis.tex"]


@pytest.mark.parametrize(
    ("status", "words", "arguments"),
    [(3, "C4 has 12 train files", ("--files", "13")), (4, "no revision 'v9'", ("--files", "1", "--revision", "v9"))],
)
def test_refused_once_the_hub_has_answered(status, words, arguments, launch: Launch, hub: Hub, workplace: Path) -> None:
    done = launch("stage", *C4, *arguments)
    assert (done.returncode, words in done.stderr) == (status, True) and not (workplace / "d").exists(), done.stderr


def test_home_is_home(launch: Launch, hub: Hub, workplace: Path) -> None:
    done = launch("stage", "c4", "--to=~/c4", "--files", "1", HOME=str(workplace / "home"))
    assert done.returncode == 0 and (workplace / "home/c4/en").is_dir() and not (workplace / "~").exists()
    assert launch("stage", "verify", "~nobody-here/c4").returncode == 2


@pytest.mark.parametrize("work", [inventory.reports, lambda place: stage_image(__file__, place, say=print)])
def test_a_place_where_the_user_may_not_look(work: Callable[[Path], object], tmp_path: Path) -> None:
    with closed(tmp_path / "closed") as place, pytest.raises(LauncherError) as caught:
        work(place / "x")
    assert "Permission denied" in caught.value.what and "ls -l" in caught.value.fix
    assert caught.value.status == ExitStatus.FILESYSTEM


def test_a_token_of_the_hub_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "closed/token"))
    hub_module.find_token()  # what is imported inside is imported
    with closed(tmp_path / "closed"), pytest.raises(LauncherError, match="cannot be read") as caught:
        hub_module.find_token()
    assert "--token-file" in caught.value.fix


def test_what_lies_under_a_files_name_is_found_before_downloading(hub: Hub, tmp_path: Path) -> None:
    target = tmp_path / "c4"
    stage_c4(target, files=1)
    (target / train(2)[0]).mkdir()
    hub.requests.clear()
    with pytest.raises(LauncherError, match="a directory, not a file") as caught:
        stage_c4(target, files=3)
    assert f"mv {target}/{train(2)[0]} " in caught.value.fix
    assert {request.where for request in hub.requests} == {"api"}
    (target / train(2)[0]).rmdir()
    (target / "en").rename(target / "moved")
    (target / "en").write_text("mine")
    with pytest.raises(LauncherError, match="en is a file, not a directory"):
        stage_c4(target, files=3)


def test_list_names_each_directory_once(hub: Hub, launch: Launch, workplace: Path) -> None:
    stage_c4(workplace / "data/c4", files=1)
    done = launch("stage", "list", "data", "data/c4", "data", "nothere")
    assert done.stdout.count("data/c4: c4 from") == 1
    assert done.returncode == 4 and "nothere: no such directory" in done.stderr


# ------------------------------------------------------------------------------------------------------ staged images


def test_damage_in_a_staged_image_is_found_by_verify(source: Path, launch: Launch, workplace: Path) -> None:
    said: list[str] = []
    path = stage_image(str(source), workplace / "my images", say=said.append)
    assert launch("stage", "verify", "my images").returncode == 0
    data = bytearray(image_bytes())
    data[-5000] ^= 1
    path.write_bytes(data)
    stage_image(str(source), workplace / "my images", say=said.append)
    assert f"launcher stage verify '{workplace}/my images'" in said[-2]  # its size alone was looked at
    done = launch("stage", "verify", "my images")
    assert done.returncode == 3 and f"{path.name}: other bytes than its checksum says" in done.stdout
    assert f"rm 'my images/{path.name}'" in done.stderr
    sidecar_path(path).unlink()
    assert launch("stage", "verify", "my images").returncode == 3, "the name holds the checksum, too"


def test_list_knows_images(source: Path, launch: Launch, workplace: Path) -> None:
    path = stage_image(str(source), workplace / "images", say=print)
    done = launch("stage", "list", "images")
    assert done.returncode == 0 and "images: images, 1 file, 3.15 MB, complete" in done.stdout
    os.truncate(path, 1 << 20)
    assert "INCOMPLETE, 1 file" in launch("stage", "list", ".").stdout
    assert read_json(sidecar_path(path)) is not None
