"""The stand-in Hub's answers, and what it keeps: the part of its API that pushes and loads models and data sets."""

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from hub_metadata import check_card

_NAME = "(?P<name>(?:datasets/)?[^/]+/[^/]+"  # as in an address: of a data set with its kind
_API = rf"/api/(?:models/|(?=datasets/)){_NAME})"
_LARGE = re.compile(r".*\.(safetensors|bin|pt|pth|onnx|model|lance)")  # stored through LFS
_ROUTES: list[tuple[tuple[str, ...], re.Pattern[str], Callable[..., Any]]] = []


class Refused(Exception):  # noqa: N818 - an answer like another
    """A request that the Hub answers with an error. The client chooses its exception by `code`."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Answer:
    """An answer that is not just JSON with status 200; bytes are sent as they are."""

    def __init__(self, content: Any = None, status: int = 200, headers: dict[str, Any] | None = None) -> None:
        self.content = content
        self.status = status
        self.headers = headers or {}


@dataclass(frozen=True)
class User:
    name: str
    organisations: tuple[str, ...] = ()
    may_write: bool = True  # what the token allows


@dataclass(frozen=True)
class File:
    content: bytes
    sha256: str | None = None  # where it is stored through LFS

    @property
    def oid(self) -> str:
        stored = self.content if self.sha256 is None else f"{self.sha256} {len(self.content)}".encode()
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    def describe(self, path: str) -> dict[str, Any]:
        shown: dict[str, Any] = {"type": "file", "path": path, "oid": self.oid, "size": len(self.content)}
        if self.sha256 is not None:
            shown["lfs"] = {"oid": self.sha256, "sha256": self.sha256, "size": shown["size"], "pointerSize": 130}
        return shown


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    author: str
    tree: dict[str, File]


@dataclass
class Repository:
    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)  # "refs/heads/main" -> commit
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # sha256 -> what was uploaded, committed or not

    def find(self, revision: str) -> Commit:
        """The commit that a branch, a tag, a full ref or a hash names."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if revision in self.commits:
            return self.commits[revision]
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add_commit(self, ref: str, tree: dict[str, File], title: str, author: str, parent: str | None) -> Commit:
        commit = Commit(secrets.token_hex(20), parent, title, author, tree)
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits of a branch, newest first."""
        found = [self.find(revision)]
        while (parent := found[-1].parent) is not None:
            found.append(self.commits[parent])
        return found


def _owner(name: str) -> str:
    return name.removeprefix("datasets/").split("/")[0]


def _route(methods: str, pattern: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        _ROUTES.append((tuple(methods.split()), re.compile(pattern), function))
        return function

    return note


class Routes:
    """Answers to requests. `url` is the API's address; `storage_url` another host's, as on the Hub."""

    def __init__(self) -> None:
        self.url = self.storage_url = ""
        self.users: dict[str, User] = {}  # by token
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}  # sha256 -> what was sent to the storage
        self.signature = secrets.token_hex(8)
        self.lock = threading.Lock()

    def answer(self, request: Any, path: str) -> Answer:
        """The answer to a request for `path`, which is still quoted: a revision may be refs%2Fpr%2F1."""
        for methods, pattern, route in _ROUTES:
            match = pattern.fullmatch(path)
            if match and request.command in methods:
                parts = {key: unquote(value) if value else None for key, value in match.groupdict().items()}
                with self.lock:
                    found = route(self, request, **parts)
                return found if isinstance(found, Answer) else Answer(found)
        raise Refused(404, f"The stand-in Hub has no {request.command} {path}")

    # --- for tests -----------------------------------------------------------------------------------------------

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Path to content of every file that the repository was given; not the Hub's own .gitattributes."""
        tree = self.repositories[name].find(revision).tree
        return {path: file.content for path, file in tree.items() if path != ".gitattributes"}

    def titles(self, name: str, revision: str = "main") -> list[str]:
        """The first lines of a branch's commits, newest first."""
        return [commit.title for commit in self.repositories[name].history(revision)]

    def state(self) -> dict[str, dict[str, str]]:
        """Every repository's refs. Equal before and after means that nothing that a visitor sees has changed."""
        return {name: dict(repository.refs) for name, repository in self.repositories.items()}

    # --- rights --------------------------------------------------------------------------------------------------

    def user_of(self, token: str) -> User | None:
        if token and token not in self.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.users.get(token)

    def writer(self, user: User | None, name: str | None = None) -> User:
        """The user, who may write: to everything in the namespace of `name`, or at all."""
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if not user.may_write:
            raise Refused(403, "Forbidden: this token is read-only, use a token with the 'write' role")
        if name is not None and _owner(name) not in (user.name, *user.organisations):
            raise Refused(403, f"You don't have the rights to write under the namespace of {name}")
        return user

    def visible(self, user: User | None, name: str) -> Repository:
        """The repository, if this user may read it; a private one looks to others as if it were not there."""
        repository = self.repositories.get(name)
        members = () if user is None else (user.name, *user.organisations)
        if repository is None or (repository.private and _owner(name) not in members):
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repository

    # --- users, repositories, revisions --------------------------------------------------------------------------

    @_route("GET", "/api/whoami-v2")
    def whoami(self, request: Any) -> dict[str, Any]:
        if (user := request.user) is None:
            raise Refused(401, "Invalid username or password.")
        token = {"displayName": "test", "role": "write" if user.may_write else "read"}
        groups = [{"type": "org", "name": name} for name in user.organisations]
        return {"type": "user", "name": user.name, "orgs": groups, "auth": {"accessToken": token}}

    @_route("POST", "/api/repos/create")
    def create_repository(self, request: Any) -> Any:
        asked = request.json()
        name = f"{asked.get('organization') or getattr(request.user, 'name', None)}/{asked['name']}"
        name = f"datasets/{name}" if asked.get("type") == "dataset" else name
        user = self.writer(request.user, name)
        made = {"url": f"{self.url}/{name}", "name": name.removeprefix("datasets/")}
        if name in self.repositories:
            return Answer({"error": "You already created this repo", **made}, 409)
        repository = self.repositories[name] = Repository(asked.get("visibility") == "private")
        repository.add_commit("refs/heads/main", {".gitattributes": File(b"*")}, "initial commit", user.name, None)
        return made

    @_route("GET", _API + "(?:/revision/(?P<revision>[^/]+))?")
    def info(self, request: Any, name: str, revision: str | None) -> dict[str, Any]:
        repository = self.visible(request.user, name)
        commit = repository.find(revision or "main")
        files = [{"rfilename": path} for path in sorted(commit.tree)]
        return {
            "id": name.removeprefix("datasets/"),
            "sha": commit.oid,
            "private": repository.private,
            "tags": [],
            "siblings": files,
        }

    @_route("POST", _API + "/(?P<kind>branch|tag)/(?P<revision>[^/]+)")
    def make_ref(self, request: Any, name: str, kind: str, revision: str) -> dict[str, Any]:
        repository, asked = self.visible(request.user, name), request.json()
        self.writer(request.user, name)
        made = f"refs/heads/{revision}" if kind == "branch" else f"refs/tags/{asked['tag']}"
        if made in repository.refs:
            raise Refused(409, f"Reference already exists: {made}")
        start = asked.get("startingPoint", "main") if kind == "branch" else revision
        repository.refs[made] = repository.find(start).oid
        return {}

    # --- reading -------------------------------------------------------------------------------------------------

    @_route("GET", _API + "/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
    def tree(self, request: Any, name: str, revision: str, folder: str | None) -> list[dict[str, Any]]:
        tree = self.visible(request.user, name).find(revision).tree
        found = [file.describe(path) for path, file in tree.items() if path.startswith(f"{folder}/" if folder else "")]
        if folder and not found:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return found

    @_route("GET HEAD", f"/{_NAME})/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def download(self, request: Any, name: str, revision: str, path: str) -> Answer:
        commit = self.visible(request.user, name).find(revision)
        if path not in commit.tree:
            return Answer(None, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.oid})
        file = commit.tree[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.oid}"'}
        if file.sha256 is None:
            return Answer(file.content, headers=headers)
        headers |= {"X-Linked-Size": len(file.content), "X-Linked-ETag": f'"{file.sha256}"'}
        return Answer(None, 302, headers | {"Location": self._link(file.sha256)})

    # --- writing -------------------------------------------------------------------------------------------------

    @_route("POST", "/api/validate-yaml")
    def validate_yaml(self, request: Any) -> Answer:
        errors = [{"message": text} for text in check_card(request.json()["content"])]
        return Answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    @_route("POST", _API + "/preupload/(?P<revision>[^/]+)")
    def preupload(self, request: Any, name: str, revision: str) -> dict[str, Any]:
        """Say of each file how it is to be sent, and the id of what is there now."""
        tree, found = self.visible(request.user, name).find(revision).tree, []
        self.writer(request.user, None if "create_pr" in request.query else name)
        for file in request.json()["files"]:
            old, mode = tree.get(file["path"]), "lfs" if _LARGE.fullmatch(file["path"]) else "regular"
            oid = None if old is None else old.sha256 or old.oid
            found.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": found}

    @_route("POST", rf"/{_NAME}?)\.git/info/lfs/objects/(?P<what>batch|verify)")
    def lfs(self, request: Any, name: str, what: str) -> dict[str, Any]:
        """Where to send each object (nowhere, where it was uploaded before), and whether it came."""
        objects, asked = self.visible(request.user, name).objects, request.json()
        self.writer(request.user)
        if what == "verify":
            if len(self.uploads.get(asked["oid"], b"")) != asked["size"]:
                raise Refused(404, f"The LFS object {asked['oid']} was not uploaded whole")
            objects[asked["oid"]] = self.uploads[asked["oid"]]
            return {}
        verify = {"href": f"{self.url}/{name}.git/info/lfs/objects/verify"}
        for item in asked["objects"]:
            if item["oid"] not in objects:
                item["actions"] = {"upload": {"href": self._link(item["oid"])}, "verify": verify}
        return {"transfer": "basic", "objects": asked["objects"]}

    @_route("POST", _API + "/commit/(?P<revision>[^/]+)")
    def commit(self, request: Any, name: str, revision: str) -> dict[str, Any]:
        """All changes of a commit or none."""
        first, *lines = [json.loads(line) for line in request.body().splitlines()]
        header, is_pull_request = first["value"], "create_pr" in request.query
        repository = self.visible(request.user, name)
        # Whoever may read a repository may propose a change to it.
        user = self.writer(request.user, None if is_pull_request else name)
        base = repository.find(revision)
        if header.get("parentCommit", base.oid) != base.oid:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(base.tree)
        for line in lines:
            path = line["value"]["path"]
            if line["key"] == "deletedFile":
                del tree[path]
            elif line["key"] == "file":
                tree[path] = File(base64.b64decode(line["value"]["content"]))
            else:
                tree[path] = File(repository.objects[line["value"]["oid"]], line["value"]["oid"])
        ref, pull_request = revision if revision.startswith("refs/") else f"refs/heads/{revision}", None
        if is_pull_request:
            number = 1 + sum(known.startswith("refs/pr/") for known in repository.refs)
            ref, pull_request = f"refs/pr/{number}", f"{self.url}/{name}/discussions/{number}"
        made = repository.add_commit(ref, tree, header["summary"], user.name, base.oid)
        page = f"{self.url}/{name}/commit/{made.oid}"
        return {"success": True, "commitOid": made.oid, "commitUrl": page, "pullRequestUrl": pull_request}

    # --- storage of large files ----------------------------------------------------------------------------------

    def _link(self, oid: str) -> str:
        return f"{self.storage_url}/lfs/{oid}?signature={self.signature}"

    @_route("GET HEAD PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def storage(self, request: Any, oid: str) -> Answer:
        """Signed links only; like the Hub's storage it refuses a second credential, so that a leaked token is seen."""
        if request.headers.get("Authorization"):
            raise Refused(400, "Only one auth mechanism allowed: the Hub's token was sent to its storage")
        if request.query.get("signature") != self.signature:
            raise Refused(403, "The signature does not match")
        if request.command != "PUT":
            return Answer(self.uploads[oid], headers={"ETag": f'"{oid}"'})
        content = request.body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "What was sent does not have the sha256 that was announced")
        self.uploads[oid] = content
        return Answer({})
