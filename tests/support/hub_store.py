"""What the stand-in Hub keeps: users, their rights, repositories with their history, and stored objects.

Nothing here knows HTTP (hub_routes.py does). All state but the bytes is in memory, open to tests.
"""

import base64
import datetime
import fnmatch
import hashlib
import re
import secrets
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LARGEST_REGULAR = 10 * 2**20  # bytes; what is larger must be stored through LFS
_LFS_SUFFIXES = [
    "safetensors",
    "bin",
    "pt",
    "pth",
    "onnx",
    "npy",
    "npz",
    "h5",
    "pkl",
    "parquet",
    "arrow",
    "gz",
    "zip",
    "tar",
    "model",
    "msgpack",
    "ckpt",
]
_ATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LFS_SUFFIXES)


class Refused(Exception):  # noqa: N818 - an answer like another
    """A request that the Hub answers with an error. The client chooses its exception by `code`."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Repo-Commit": commit}


@dataclass(frozen=True)
class User:
    name: str
    organisations: tuple[str, ...] = ()
    may_write: bool = True  # what the token allows

    def belongs_to(self, namespace: str) -> bool:
        return namespace in (self.name, *self.organisations)


@dataclass(frozen=True)
class Entry:
    """One file of one commit; `sha256` where it is stored through LFS."""

    oid: str
    size: int
    sha256: str | None = None

    def describe(self, path: str) -> dict[str, Any]:
        shown: dict[str, Any] = {"type": "file", "path": path, "oid": self.oid, "size": self.size}
        if self.sha256 is not None:
            pointer = len(lfs_pointer(self.sha256, self.size))
            shown["lfs"] = {"oid": self.sha256, "sha256": self.sha256, "size": self.size, "pointerSize": pointer}
        return shown


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    author: str
    date: str
    tree: dict[str, Entry]


@dataclass
class Repository:
    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)  # "refs/heads/main" -> commit
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: set[str] = field(default_factory=set)  # sha256 of what was uploaded to it, committed or not

    def find(self, revision: str) -> Commit:
        """The commit that a branch, a tag, a full ref or a hash names."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if revision in self.commits:
            return self.commits[revision]
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add_commit(self, ref: str, tree: dict[str, Entry], title: str, author: str, parent: str | None) -> Commit:
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        commit = Commit(secrets.token_hex(20), parent, title, author, date, tree)
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits of a branch, newest first."""
        found = [self.find(revision)]
        while (parent := found[-1].parent) is not None:
            found.append(self.commits[parent])
        return found


class Store:
    """Who may do what, and what is there."""

    def __init__(self, root: Path) -> None:
        self.blobs = root / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()
        self.users: dict[str, User] = {}  # token -> user
        self.repositories: dict[tuple[str, str], Repository] = {}  # ("model", "acme/name") -> repository

    # --- for tests -----------------------------------------------------------------------------------------------

    def repository(self, name: str, kind: str = "model") -> Repository:
        return self.repositories[kind, name]

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Path to content of every file that the repository was given; not the Hub's own .gitattributes."""
        tree = self.repository(name, kind).find(revision).tree
        return {path: self.read(entry) for path, entry in tree.items() if path != ".gitattributes"}

    def state(self) -> dict[tuple[str, str], dict[str, str]]:
        """Every repository's refs. Equal before and after means that nothing that a visitor sees has changed."""
        return {key: dict(repository.refs) for key, repository in self.repositories.items()}

    # --- rights --------------------------------------------------------------------------------------------------

    def user_of(self, token: str) -> User | None:
        if token and token not in self.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.users.get(token)

    @staticmethod
    def signed_in(user: User | None) -> User:
        if user is None:
            raise Refused(401, "Invalid username or password.")
        return user

    def with_write_token(self, user: User | None) -> User:
        """The user, if the token is for more than reading."""
        user = self.signed_in(user)
        if not user.may_write:
            raise Refused(403, "Forbidden: this token is read-only, use a token with the 'write' role")
        return user

    def writer(self, user: User | None, name: str) -> User:
        """The user, who may write to everything in the namespace of `name`."""
        user = self.with_write_token(user)
        namespace = name.split("/")[0]
        if not user.belongs_to(namespace):
            raise Refused(403, f'You don\'t have the rights to write under the namespace "{namespace}"')
        return user

    def visible(self, user: User | None, kind: str, name: str) -> Repository:
        """The repository, if this user may read it; a private one looks to others as if it were not there."""
        repository = self.repositories.get((kind, name))
        hidden = repository is not None and repository.private
        if hidden and not (user is not None and user.belongs_to(name.split("/")[0])):
            repository = None
        if repository is None:
            if user is None:
                raise Refused(401, "Invalid username or password.", "RepoNotFound")
            raise Refused(404, "Repository not found", "RepoNotFound")
        return repository

    # --- content -------------------------------------------------------------------------------------------------

    def blob(self, oid: str) -> Path:
        if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", oid):
            raise Refused(400, f"Not an object id: {oid}")
        return self.blobs / oid

    def read(self, entry: Entry) -> bytes:
        return self.blob(entry.sha256 or entry.oid).read_bytes()

    def text(self, tree: dict[str, Entry], path: str) -> str:
        return self.read(tree[path]).decode() if path in tree else ""

    def write(self, content: bytes) -> Entry:
        entry = Entry(git_oid(content), len(content))
        self.blob(entry.oid).write_bytes(content)
        return entry

    def create(self, kind: str, name: str, private: bool, author: User) -> Repository:
        repository = self.repositories[kind, name] = Repository(private)
        tree = {".gitattributes": self.write(_ATTRIBUTES.encode())}
        repository.add_commit("refs/heads/main", tree, "initial commit", author.name, None)
        return repository

    def goes_through_lfs(self, tree: dict[str, Entry], path: str, size: int, sample: bytes) -> bool:
        lines = self.text(tree, ".gitattributes").splitlines()
        patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
        named = any(fnmatch.fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in patterns)
        return named or size > LARGEST_REGULAR or b"\0" in sample

    def apply(self, repository: Repository, tree: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
        """Carry out one line of a commit on `tree`."""
        path = value["path"]
        if path.startswith("/") or ".." in path.split("/"):
            raise Refused(400, f"Invalid path in commit: {path}")
        if key == "file":
            content = base64.b64decode(value["content"])
            if len(content) > LARGEST_REGULAR:
                raise Refused(400, f"{path} is larger than 10 MiB and must be uploaded with LFS")
            tree[path] = self.write(content)
        elif key == "lfsFile":
            sha256 = value["oid"]
            if sha256 not in repository.objects:
                raise Refused(400, f"The LFS pointer of {path} points to an object that was not uploaded")
            size = self.blob(sha256).stat().st_size
            tree[path] = Entry(git_oid(lfs_pointer(sha256, size)), size, sha256)
        elif key in ("deletedFile", "deletedFolder"):
            inside = path.rstrip("/") + "/"
            gone = [name for name in tree if (name.startswith(inside) if key == "deletedFolder" else name == path)]
            if not gone:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del tree[name]
        else:
            raise Refused(400, f"Unknown operation in commit: {key}")


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
