"""The stand-in Hub's answers: the part of the Hub's HTTP API that huggingface_hub uses to push and to load."""

import base64
import contextlib
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

import yaml

from hub_metadata import check_card, front_matter
from hub_store import Commit, Refused, Repository, Store, User, git_oid

_API = r"/api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)"
_WEB = r"/(?:(?P<kind>dataset|space)s/)?(?P<name>[^/]+/[^/]+?)"


class Request(Protocol):
    """What a route sees of a request."""

    command: str
    query: dict[str, str]
    user: User | None
    headers: Any

    def chunks(self) -> Iterator[bytes]: ...

    def json(self) -> Any: ...


class Answer:
    """An answer that is not just JSON with status 200. A `Path` is sent as that file's content."""

    def __init__(self, content: Any = None, status: int = 200, headers: dict[str, Any] | None = None) -> None:
        self.content = content
        self.status = status
        self.headers = headers or {}


_ROUTES: list[tuple[tuple[str, ...], re.Pattern[str], str]] = []


def _route(methods: str, pattern: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        _ROUTES.append((tuple(methods.split()), re.compile(pattern), function.__name__))
        return function

    return note


class Routes(Store):
    """Answers to requests. `url` is the API's address; `storage_url` another host's, as on the Hub."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.url = ""
        self.storage_url = ""
        self._key = secrets.token_bytes(16)

    def answer(self, request: Request, path: str) -> Answer:
        """The answer to a request for `path`, which is still quoted: a revision may be refs%2Fpr%2F1."""
        for methods, pattern, route in _ROUTES:
            match = pattern.fullmatch(path)
            if match and request.command in methods:
                parts = {key: unquote(value) if value else None for key, value in match.groupdict().items()}
                if "kind" in parts:
                    parts["kind"] = parts["kind"] or "model"
                lock = contextlib.nullcontext() if route == "storage" else self.lock
                with lock:
                    found = getattr(self, route)(request, **parts)
                return found if isinstance(found, Answer) else Answer(found)
        hint = " (it does not speak Xet: set HF_HUB_DISABLE_XET=1)" if "/xet-" in path else ""
        raise Refused(404, f"The stand-in Hub has no {request.command} {path}{hint}")

    def page(self, kind: str, name: str, tail: str = "") -> str:
        return f"{self.url}/{'' if kind == 'model' else kind + 's/'}{name}{tail}"

    # --- users and repositories ----------------------------------------------------------------------------------

    @_route("GET", "/api/whoami-v2")
    def whoami(self, request: Request) -> dict[str, Any]:
        user = self.signed_in(request.user)
        role = "write" if user.may_write else "read"
        return {
            "type": "user",
            "name": user.name,
            "orgs": [{"type": "org", "name": name} for name in user.organisations],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
        }

    @_route("POST", "/api/repos/create")
    def create_repository(self, request: Request) -> Any:
        asked = request.json()
        kind, short = asked.get("type") or "model", asked["name"]
        name = f"{asked.get('organization') or self.signed_in(request.user).name}/{short}"
        user = self.writer(request.user, name)
        if not re.fullmatch(r"\w([\w.-]{0,94}\w)?", short, re.ASCII) or re.search(r"--|\.\.", short):
            raise Refused(400, f"Invalid repo name: {name}")
        found = {"url": self.page(kind, name), "name": name}
        if (kind, name) in self.repositories:
            return Answer({"error": f"You already created this {kind} repo", **found}, 409)
        self.create(kind, name, asked.get("visibility") == "private", user)
        return found

    @_route("DELETE", "/api/repos/delete")
    def delete_repository(self, request: Request) -> dict[str, Any]:
        asked = request.json()
        kind = asked.get("type") or "model"
        name = f"{asked.get('organization') or self.signed_in(request.user).name}/{asked['name']}"
        self.visible(request.user, kind, name)
        self.writer(request.user, name)
        del self.repositories[kind, name]
        return {}

    @_route("GET", _API + "(?:/revision/(?P<revision>[^/]+))?")
    def info(self, request: Request, kind: str, name: str, revision: str | None) -> dict[str, Any]:
        repository = self.visible(request.user, kind, name)
        commit = repository.find(revision or "main")
        card: dict[str, Any] = {}
        with contextlib.suppress(yaml.YAMLError):
            card = front_matter(self.text(commit.tree, "README.md"))
        config = json.loads(self.text(commit.tree, "config.json") or "{}")
        tags = [card.get("library_name"), card.get("pipeline_tag"), *(card.get("tags") or []), config.get("model_type")]
        tags += ["custom_code"] if "auto_map" in config else []
        return {
            "id": name,
            "modelId": name,
            "author": name.split("/")[0],
            "sha": commit.oid,
            "private": repository.private,
            "lastModified": commit.date,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "cardData": card,
            "config": config,
            "tags": [tag for tag in dict.fromkeys(tags) if tag],
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "siblings": [
                {"rfilename": path, "blobId": entry.oid, **entry.describe(path)}
                for path, entry in sorted(commit.tree.items())
            ],
        }

    # --- history -------------------------------------------------------------------------------------------------

    @_route("GET", _API + "/refs")
    def refs(self, request: Request, kind: str, name: str) -> dict[str, Any]:
        groups: dict[str, list[dict[str, str]]] = {"heads": [], "tags": [], "pr": []}
        for ref, oid in self.visible(request.user, kind, name).refs.items():
            _, group, short = ref.split("/", 2)
            groups[group].append({"name": short, "ref": ref, "targetCommit": oid})
        return {"branches": groups["heads"], "tags": groups["tags"], "pullRequests": groups["pr"], "converts": []}

    @_route("GET", _API + "/commits/(?P<revision>[^/]+)")
    def commits(self, request: Request, kind: str, name: str, revision: str) -> list[dict[str, Any]]:
        return [
            {"id": commit.oid, "title": commit.title, "message": "", "date": commit.date, "authors": []}
            for commit in self.visible(request.user, kind, name).history(revision)
        ]

    @_route("POST DELETE", _API + "/branch/(?P<branch>[^/]+)")
    def branch(self, request: Request, kind: str, name: str, branch: str) -> dict[str, Any]:
        start = request.json().get("startingPoint", "main") if request.command == "POST" else None
        return self._change_ref(request, kind, name, f"refs/heads/{branch}", start)

    @_route("POST DELETE", _API + "/tag/(?P<revision>[^/]+)")
    def tag(self, request: Request, kind: str, name: str, revision: str) -> dict[str, Any]:
        if request.command == "DELETE":
            return self._change_ref(request, kind, name, f"refs/tags/{revision}", None)
        return self._change_ref(request, kind, name, f"refs/tags/{request.json()['tag']}", revision)

    def _change_ref(self, request: Request, kind: str, name: str, ref: str, start: str | None) -> dict[str, Any]:
        """Make `ref` at the revision `start`, or remove it."""
        repository = self.visible(request.user, kind, name)
        self.writer(request.user, name)
        if start is None:
            if repository.refs.pop(ref, None) is None:
                raise Refused(404, f"Invalid rev id: {ref}", "RevisionNotFound")
        elif ref in repository.refs:
            raise Refused(409, f"Reference already exists: {ref}")
        else:
            repository.refs[ref] = repository.find(start).oid
        return {}

    # --- reading -------------------------------------------------------------------------------------------------

    @_route("GET", _API + "/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
    def tree(
        self, request: Request, kind: str, name: str, revision: str, folder: str | None
    ) -> list[dict[str, Any]] | Answer:
        commit = self.visible(request.user, kind, name).find(revision)
        inside = f"{folder.strip('/')}/" if folder else ""
        recursive = request.query.get("recursive", "").lower() == "true"
        found: dict[str, dict[str, Any]] = {}
        for path, entry in sorted(commit.tree.items()):
            if not path.startswith(inside):
                continue
            *parents, _ = path.removeprefix(inside).split("/")
            for depth in range(1, 1 + (len(parents) if recursive else min(1, len(parents)))):
                name_of = inside + "/".join(parents[:depth])
                found[name_of] = {"type": "directory", "path": name_of, "oid": git_oid(name_of.encode()), "size": 0}
            if recursive or not parents:
                found[path] = entry.describe(path)
        if folder and not found:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound", commit.oid)
        return list(found.values())

    @_route("POST", _API + "/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, request: Request, kind: str, name: str, revision: str) -> list[dict[str, Any]]:
        commit, paths = self.visible(request.user, kind, name).find(revision), request.json()["paths"]
        return [commit.tree[path].describe(path) for path in paths if path in commit.tree]

    @_route("GET HEAD", _WEB + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def download(self, request: Request, kind: str, name: str, revision: str, path: str) -> Answer:
        repository = self.visible(request.user, kind, name)
        commit = repository.find(revision)
        if path not in commit.tree:
            raise Refused(404, "Entry not found", "EntryNotFound", commit.oid)
        entry = commit.tree[path]
        headers: dict[str, Any] = {"X-Repo-Commit": commit.oid, "ETag": f'"{entry.oid}"'}
        if entry.sha256 is None:
            return Answer(self.blob(entry.oid), headers=headers)
        headers |= {"X-Linked-Size": entry.size, "X-Linked-ETag": f'"{entry.sha256}"'}
        return Answer(None, 302, headers | {"Location": self._link("GET", entry.sha256)})

    # --- writing -------------------------------------------------------------------------------------------------

    @_route("POST", "/api/validate-yaml")
    def validate_yaml(self, request: Request) -> Answer:
        errors, warnings = check_card(request.json()["content"])
        found = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
        return Answer(found, 400 if errors else 200)

    @_route("POST", _API + "/preupload/(?P<revision>[^/]+)")
    def preupload(self, request: Request, kind: str, name: str, revision: str) -> dict[str, Any]:
        """Say of each file how it is to be sent, and the id of what is there now."""
        repository = self.visible(request.user, kind, name)
        if "create_pr" not in request.query:
            self.writer(request.user, name)
        tree, found = repository.find(revision).tree, []
        for file in request.json()["files"]:
            path, old = file["path"], tree.get(file["path"])
            lfs = self.goes_through_lfs(tree, path, file["size"], base64.b64decode(file.get("sample", "")))
            oid = None if old is None else old.sha256 or old.oid
            found.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        return {"files": found}

    @_route("POST", _WEB + r"\.git/info/lfs/objects/batch")
    def lfs_batch(self, request: Request, kind: str, name: str) -> dict[str, Any]:
        """Where to send each object; nowhere, where it was uploaded before."""
        repository = self.visible(request.user, kind, name)
        self.signed_in(request.user)
        verify = {"href": self.page(kind, name, ".git/info/lfs/objects/verify")}
        objects = []
        for item in request.json()["objects"]:
            known = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in repository.objects:
                known["actions"] = {"upload": {"href": self._link("PUT", item["oid"])}, "verify": verify}
            objects.append(known)
        return {"transfer": "basic", "objects": objects}

    @_route("POST", _WEB + r"\.git/info/lfs/objects/verify")
    def lfs_verify(self, request: Request, kind: str, name: str) -> dict[str, Any]:
        repository = self.visible(request.user, kind, name)
        self.signed_in(request.user)
        asked = request.json()
        blob = self.blob(asked["oid"])
        if not blob.exists() or blob.stat().st_size != asked["size"]:
            raise Refused(404, f"The LFS object {asked['oid']} was not uploaded whole")
        repository.objects.add(asked["oid"])
        return {}

    @_route("POST", _API + "/commit/(?P<revision>[^/]+)")
    def commit(self, request: Request, kind: str, name: str, revision: str) -> dict[str, Any]:
        """All changes of a commit or none."""
        first, *lines = [json.loads(line) for line in b"".join(request.chunks()).splitlines()]
        header, is_pull_request = first["value"], "create_pr" in request.query
        repository = self.visible(request.user, kind, name)
        # Whoever may read a repository may propose a change to it.
        user = self.with_write_token(request.user) if is_pull_request else self.writer(request.user, name)
        base = repository.find(revision)
        if header.get("parentCommit", base.oid) != base.oid:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(base.tree)
        for line in lines:
            self.apply(repository, tree, line["key"], line["value"])
        return self._committed(kind, name, repository, base, tree, header["summary"], user, revision, is_pull_request)

    def _committed(
        self,
        kind: str,
        name: str,
        repository: Repository,
        base: Commit,
        tree: dict[str, Any],
        title: str,
        user: User,
        revision: str,
        is_pull_request: bool,
    ) -> dict[str, Any]:
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        pull_request = None
        if is_pull_request:
            number = 1 + sum(known.startswith("refs/pr/") for known in repository.refs)
            ref, pull_request = f"refs/pr/{number}", self.page(kind, name, f"/discussions/{number}")
        elif ref not in repository.refs:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        commit = repository.add_commit(ref, tree, title, user.name, base.oid)
        page = self.page(kind, name, f"/commit/{commit.oid}")
        return {"success": True, "commitOid": commit.oid, "commitUrl": page, "pullRequestUrl": pull_request}

    # --- storage of large files ----------------------------------------------------------------------------------

    def _link(self, verb: str, oid: str) -> str:
        signature = hmac.new(self._key, f"{verb} {oid}".encode(), "sha256").hexdigest()
        return f"{self.storage_url}/lfs/{oid}?signature={signature}"

    @_route("GET HEAD PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def storage(self, request: Request, oid: str) -> Answer:
        """Signed links only; like the Hub's storage it refuses a second credential, so that a leaked token is seen."""
        if request.headers.get("Authorization"):
            raise Refused(400, "Only one auth mechanism allowed: the Hub's token was sent to its storage")
        expected = self._link("PUT" if request.command == "PUT" else "GET", oid)
        if not expected.endswith(f"?signature={request.query.get('signature')}"):
            raise Refused(403, "The signature does not match")
        if request.command != "PUT":
            return Answer(self.blob(oid), headers={"ETag": f'"{oid}"'})
        arriving, digest = self.blobs / f"arriving-{secrets.token_hex(8)}", hashlib.sha256()
        try:
            with arriving.open("wb") as file:
                for chunk in request.chunks():
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != oid:
                raise Refused(400, "What was sent does not have the sha256 that was announced")
            arriving.replace(self.blob(oid))
        finally:
            arriving.unlink(missing_ok=True)
        return Answer({})
