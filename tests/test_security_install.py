"""Attacks on what root runs: a server that lies to install.sh, links in the service's directory, another's HOME."""

from __future__ import annotations

import hashlib
import hmac
import http.server
import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, find_program

import server

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="runs as root and as another user")
NOBODY = 65534
TOKEN = "whsec_" + "a" * 43 + "="
NAME = "proxmox-monitor-agent"

# --- install.sh against a server that lies: installed below a folder, with nothing started ---


class Releases(http.server.ThreadingHTTPServer):
    """A server's /install; `files` are what it hands out."""

    files: dict[str, bytes]

    class RequestHandlerClass(http.server.BaseHTTPRequestHandler):  # type: ignore[assignment]
        def do_GET(self) -> None:
            body = self.server.files.get(self.path.rpartition("/")[2])  # type: ignore[attr-defined]
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: object) -> None:
            pass

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.RequestHandlerClass)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def releases() -> Iterator[Releases]:
    served = Releases()
    served.files = {}
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


class Host:
    """A machine's folders below one of the test's."""

    def __init__(self, folder: Path, url: str):
        self.folder, self.url = folder, url
        self.config = folder / "etc/proxmox-monitor/agent.toml"
        self.program = folder / f"usr/local/bin/{NAME}"
        self.installer = folder / f"usr/local/sbin/{NAME}-install"

    def script(self, url: str) -> str:
        text = (ROOT / "packaging/install.sh").read_text().replace("@SERVER_URL@", url)
        return re.sub(r"(?m)(?<=[= \"])/(usr|etc|var)/", rf"{self.folder}/\1/", text)

    def run(self, *argv: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
        env = {"PATH": os.environ["PATH"], "no_proxy": "*", **({"TOKEN": token} if token else {})}
        return subprocess.run(["sh", "-c", self.script(self.url), "sh", "--no-start", "--plain", *argv], env=env,
                              capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)  # fmt: skip


@pytest.fixture
def host(tmp_path, releases) -> Host:
    return Host(tmp_path / "host", releases.url)


def key_pair(folder: Path, name: str) -> Path:
    path = folder / name
    argv = [find_program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(path)]
    subprocess.run(argv, check=True)
    return path


def publish(releases: Releases, host: Host, *, signer: Path | None = None, agent: bytes = b"#!/bin/sh\necho 1.0\n") -> None:
    """A release: agent, unit, installer and their sums, signed if there is a signer."""
    files = {"agent.py": agent, f"systemd/{NAME}.service": b"[Service]\n",
             "packaging/install.sh": host.script("@SERVER_URL@").encode()}  # fmt: skip
    sums = "".join(f"{hashlib.sha256(body).hexdigest()}  {name}\n" for name, body in files.items()).encode()
    releases.files = {"agent.py": agent, f"{NAME}.service": files[f"systemd/{NAME}.service"],
                      "install.sh.in": files["packaging/install.sh"], "SHA256SUMS": sums}  # fmt: skip
    if signer:
        argv = ["ssh-keygen", "-q", "-Y", "sign", "-f", str(signer), "-n", "proxmon"]
        signed = subprocess.run(argv, input=sums, capture_output=True, check=True).stdout
        releases.files |= {"SHA256SUMS.sig": signed, "release-key": signer.with_suffix(".pub").read_bytes()}


@needs_root
def test_after_a_signed_installation_only_that_signer_is_believed(host, releases, tmp_path):
    ours, theirs = key_pair(tmp_path, "ours"), key_pair(tmp_path, "theirs")
    publish(releases, host, signer=ours)
    first = host.run("--host", "pve1")
    assert first.returncode == 0, first.stderr
    assert "SHA256:" in first.stdout  # the signer's fingerprint, to be compared
    installed = host.program.read_bytes()
    evil = b"#!/bin/sh\necho evil\n"
    for lie, words in ((theirs, "not signed by"), (None, "not signed")):
        publish(releases, host, signer=lie, agent=evil)
        answer = host.run()
        assert answer.returncode != 0 and words in answer.stderr and "nothing was changed" in answer.stderr
        assert host.program.read_bytes() == installed
    publish(releases, host, signer=ours, agent=evil)
    releases.files["SHA256SUMS"] += b"\n"  # what was signed is not what is handed out
    assert host.run().returncode != 0 and host.program.read_bytes() == installed
    publish(releases, host, signer=ours)
    releases.files["agent.py"] = evil
    assert "checksum" in host.run().stderr and host.program.read_bytes() == installed


@needs_root
def test_the_installer_that_stays_on_the_host_upgrades_without_a_word_from_the_server(host, releases, tmp_path):
    ours = key_pair(tmp_path, "ours")
    publish(releases, host, signer=ours)
    assert host.run("--host", "pve1").returncode == 0
    publish(releases, host, signer=ours, agent=b"#!/bin/sh\necho 2.0\n")
    releases.files["install.sh"] = b"#!/bin/sh\necho evil\n"  # nobody asks for it
    answer = subprocess.run([host.installer, "--plain", "--no-start"], capture_output=True, text=True, timeout=60,
                            env={"PATH": os.environ["PATH"], "no_proxy": "*"}, stdin=subprocess.DEVNULL)  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert b"2.0" in host.program.read_bytes() and TOKEN in host.config.read_text()


@needs_root
def test_a_key_that_the_operator_brings_is_the_one_that_counts(host, releases, tmp_path):
    ours, theirs = key_pair(tmp_path, "ours"), key_pair(tmp_path, "theirs")
    publish(releases, host, signer=theirs)
    answer = host.run("--host", "pve1", "--release-key", f"{ours}.pub")
    assert answer.returncode != 0 and "not signed by" in answer.stderr
    assert not host.program.exists()


@needs_root
def test_an_unsigned_release_is_installed_and_called_so(host, releases):
    publish(releases, host)
    answer = host.run("--host", "pve1")
    assert answer.returncode == 0 and "not signed" in answer.stdout
    assert stat.S_IMODE(host.config.stat().st_mode) == 0o600


@needs_root
def test_a_token_in_a_file_of_its_own_stays_there(host, releases):
    publish(releases, host)
    host.config.parent.mkdir(parents=True)
    host.config.write_text(f'server_url = "{releases.url}"\nhost_id = "pve1"\ntoken_file = "/etc/keys/proxmon"\n')
    answer = host.run(token="")
    assert answer.returncode == 0, answer.stderr
    text = host.config.read_text()
    assert 'token_file = "/etc/keys/proxmon"' in text and not re.search(r"^token\b", text, re.M)
    assert host.run(token=TOKEN).returncode == 0  # a new one, given on purpose
    assert f'token = "{TOKEN}"' in host.config.read_text() and "token_file" not in host.config.read_text()


@needs_root
@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1.evil.example", "http://localhost.evil.example", "http://127.evil.example", "http://[::1].evil.example",
     "http://localhost@evil.example", "http://evil.example", "file:///etc/passwd", "https://x/$(id)", 'https://x"y'],
)  # fmt: skip
def test_plain_http_is_for_this_machine_alone(host, url):
    answer = host.run("--host", "pve1", "--server", url)
    assert answer.returncode != 0 and "cannot get" not in answer.stderr
    assert not host.config.exists()


def test_no_redirect_leads_from_https_to_http():
    text = (ROOT / "packaging/install.sh").read_text()
    assert re.search(r'https://\?\*\) protocol="=https"', text)
    for call in re.findall(r"\bcurl --.*", text):
        assert '--proto "$protocol" --proto-redir "$protocol"' in call
    for name in ("README.md", "docs/install-agent.md"):
        lines = re.findall(r"curl .*install\.sh.*", (ROOT / name).read_text())
        assert lines and all("--proto =https --proto-redir =https" in line for line in lines)


@pytest.mark.parametrize("url", ['https://m.example/"; touch /tmp/x; "', "https://m.example/$(id)", "https://m.example/`id`",
                                 "https://m.example/a b", "http://[::1/", "https://x:99999", "https://", "//x", "x"])  # fmt: skip
def test_a_public_url_that_a_shell_would_run_is_refused(url):
    with pytest.raises(server.Failure, match="PUBLIC_URL"):
        server.Config({"PUBLIC_URL": url})


@pytest.mark.parametrize("name, value", [
    ("HEARTBEAT_URL", "http://[::1/s3cret"), ("HEARTBEAT_URL", "ftp://x/s3cret"), ("HISTORY_URL", "http://[::1/s3cret"),
    ("TRUSTED_PROXY", "proxy.example"), ("SECRET_KEY_BASE", " " * 40), ("PORT", "-1")])  # fmt: skip
def test_a_wrong_setting_is_refused_without_showing_what_may_be_secret(name, value):
    with pytest.raises(server.Failure, match=name) as told:
        server.Config({name: value})
    assert "s3cret" not in str(told.value)


def test_what_is_allowed_and_no_good_is_told():
    config = server.Config({"TRUSTED_PROXY": "0.0.0.0/0, ::/0, 10.0.0.1", "SECRET_KEY_BASE": "s" * 48})
    told = " ".join(config.doubts())
    assert "0.0.0.0/0" in told and "::/0" in told and "10.0.0.1" not in told and "SECRET_KEY_BASE" in told
    assert not list(server.Config({"SECRET_KEY_BASE": "0123456789abcdef" * 4}).doubts())


def test_a_stolen_database_hardly_tells_whether_a_guess_at_the_secret_is_right(monitor):
    mark = server.get_meta(monitor.store.reader(), "secret_check")
    assert mark and len(mark) == 2  # 8 bits: one wrong guess in 256 fits as well


def test_the_mark_of_an_older_version_is_shortened(monitor):
    whole = hmac.digest(monitor.secret, b"proxmon secret check", "sha256").hex()
    monitor.store.write(lambda db: server.set_meta(db, "secret_check", whole))
    monitor.store.write(lambda db: server.check_secret(db, monitor.secret))
    assert server.get_meta(monitor.store.reader(), "secret_check") == whole[:2]


def test_another_secret_is_noticed_at_the_start(monitor, capsys):
    monitor.close()
    given = {"DATABASE_PATH": monitor.config.database_path, "SECRET_KEY_BASE": "another secret than before, and long enough"}
    server.Monitor(server.Config(given), monitor.clock).close()
    assert "not the one the hosts' tokens were made with" in capsys.readouterr().out


# --- commands that root types in the service's directory ---


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with `state`, which is the service's user's, and `victim`, a file of root's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "state").mkdir(mode=0o700)
        os.chown(folder / "state", NOBODY, NOBODY)
        (folder / "victim").write_text("root:secret\n" * 20)
        (folder / "victim").chmod(0o640)
        yield folder


def typed(place: Path, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    given = {"PATH": os.environ["PATH"], "DATABASE_PATH": str(place / "state/monitor.db"), **env}
    return subprocess.run([sys.executable, ROOT / "server.py", *argv], env=given, capture_output=True, text=True,
                          timeout=60, stdin=subprocess.DEVNULL)  # fmt: skip


def look(path: Path) -> tuple[int, int, bytes]:
    found = path.stat()
    return found.st_uid, found.st_mode, path.read_bytes()


COMMANDS = [("register-host", "h"), ("rotate-token", "h"), ("migrate",), ("create-api-token", "t"), ("list-hosts",),
            ("end-sessions",), ("unlock-login",), ("status",), ("check",), ("rollback",), ("serve",)]  # fmt: skip


@needs_root
@pytest.mark.parametrize("argv", COMMANDS, ids=lambda argv: argv[0])
@pytest.mark.parametrize("links", [("",), (".lock", ".secret", "-wal", "-shm")], ids=["database", "beside it"])
def test_no_command_follows_a_link_of_the_services_user(place, argv, links):
    before = look(place / "victim")
    for suffix in links:
        os.symlink(place / "victim", place / "state" / f"monitor.db{suffix}")
    typed(place, *argv, LISTEN="256.0.0.1")  # no such address: `serve` ends by itself
    assert look(place / "victim") == before


@needs_root
def test_commands_of_roots_do_their_work_as_the_services_user(place):
    for argv in (("migrate",), ("register-host", "h"), ("rotate-token", "h"), ("create-api-token", "t"), ("list-hosts",),
                 ("list-users",), ("unlock-login",), ("end-sessions",), ("check",)):  # fmt: skip
        done = typed(place, *argv)
        assert done.returncode == 0, (argv, done.stderr, done.stdout)
    assert {path.stat().st_uid for path in (place / "state").iterdir()} == {NOBODY}
    assert typed(place, "backup", str(place / "b.db"), SUDO_USER="otto").returncode == 0
    assert typed(place, "restore", str(place / "b.db"), SUDO_USER="otto").returncode == 0
    assert {path.stat().st_uid for path in (place / "state").iterdir()} == {NOBODY}


@needs_root
def test_a_backup_goes_to_no_link_and_into_nobodys_file(place):
    typed(place, "register-host", "h")
    open_to_all = place / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o1777)
    before = look(place / "victim")
    os.symlink(place / "victim", open_to_all / "b.db")
    (open_to_all / "c.db.partial").write_bytes(b"")
    (open_to_all / "c.db.partial").chmod(0o666)
    assert "exists already" in typed(place, "backup", str(open_to_all / "b.db")).stderr
    done = typed(place, "backup", str(open_to_all / "c.db"))
    assert done.returncode == 0, done.stderr
    assert look(place / "victim") == before
    made = (open_to_all / "c.db").stat()
    assert (made.st_uid, stat.S_IMODE(made.st_mode)) == (0, 0o600)
    assert sorted(path.name for path in open_to_all.iterdir()) == ["b.db", "c.db", "c.db.partial"]
    with sqlite3.connect(open_to_all / "c.db") as copy:
        assert copy.execute("SELECT name FROM host").fetchall() == [("h",)]


@needs_root
def test_a_failed_backup_leaves_nothing(place):
    assert typed(place, "backup", str(place / "none.db")).returncode == 1
    assert not (place / "none.db").exists() and sorted(os.listdir(place)) == ["state", "victim"]


# --- restore ---


def test_a_restore_ends_sessions_and_tells_what_it_gives_back(tmp_path, monkeypatch, capsys):
    def run(*argv: str) -> tuple[int, str, str]:
        code = server.main(list(argv))
        return code, *capsys.readouterr()

    path, copy = tmp_path / "monitor.db", tmp_path / "copy.db"
    monkeypatch.setenv("DATABASE_PATH", str(path))
    run("register-host", "pve1")
    run("create-api-token", "thief", "--admin")
    with sqlite3.connect(path) as db:
        db.execute("INSERT INTO session VALUES (x'00', 1e12, 1e12, '', '', 'admin')")
    assert run("backup", str(copy))[0] == 0
    run("rotate-token", "pve1")
    run("revoke-api-token", "thief")
    code, out, _ = run("restore", str(copy))
    assert code == 0
    assert "Token of pve1 rotated" in out and "API token thief revoked" in out
    db = sqlite3.connect(path)
    assert db.execute("SELECT count(*) FROM session").fetchone() == (0,)
    assert db.execute("SELECT name FROM api_token").fetchall() == [("thief",)]
    assert db.execute("SELECT kind FROM event ORDER BY id DESC").fetchone() == ("restored",)
    kept = next(path for path in tmp_path.glob("monitor.db.before-restore-*") if path.name[-1].isdigit())
    assert sqlite3.connect(kept).execute("SELECT count(*) FROM api_token").fetchone() == (0,)
    assert copy.exists()


@pytest.mark.parametrize("content", [b"", b"no database", None])
def test_what_is_no_backup_is_not_restored(tmp_path, monkeypatch, capsys, content):
    monkeypatch.setenv("DATABASE_PATH", str(tmp_path / "monitor.db"))
    server.main(["register-host", "pve1"])
    if content is not None:
        (tmp_path / "copy").write_bytes(content)
    capsys.readouterr()
    assert server.main(["restore", str(tmp_path / "copy")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    with sqlite3.connect(tmp_path / "monitor.db") as db:
        assert db.execute("SELECT name FROM host").fetchall() == [("pve1",)]
    db.close()
    assert {path.name for path in tmp_path.iterdir()} <= {"monitor.db", "monitor.db.secret", "monitor.db.lock", "copy"}


def test_nothing_is_restored_below_a_running_server(live_server, tmp_path):
    assert live_server.command("backup", str(tmp_path / "copy")).returncode == 0
    answer = live_server.command("restore", str(tmp_path / "copy"))
    assert answer.returncode == 1 and "another server" in answer.stderr


# --- the file that unpacks itself ---


@pytest.fixture
def packed(tmp_path) -> Iterator[Path]:
    """unpack.sh around a tiny program, under a name that no other has."""
    name = f"proxmon-test-{os.getpid()}"
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / name).write_text("#!/bin/sh\necho genuine\n")
    (tmp_path / "tree" / name).chmod(0o755)
    payload = subprocess.run(["tar", "-cz", "-C", tmp_path / "tree", "."], capture_output=True, check=True).stdout
    arch = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    text, head, size = (ROOT / "packaging/unpack.sh").read_text(), b"", -1
    while len(head) != size:
        size = len(head)
        filled = {"NAME": name, "VERSION": "1", "ARCH": arch, "DIGEST": hashlib.sha256(payload).hexdigest(),
                  "START": str(size + 1), "SIZE": str(size + len(payload))}  # fmt: skip
        head = text.encode()
        for key, value in filled.items():
            head = head.replace(f"@{key}@".encode(), value.encode())
    path = tmp_path / "packed"
    path.write_bytes(head + payload)
    path.chmod(0o755)
    yield path
    subprocess.run(["rm", "-rf", f"/var/cache/{name}"], check=True)


@needs_root
def test_root_runs_nothing_out_of_anothers_home(packed, tmp_path):
    """sudo -E and su -m keep HOME: who owns it could put his own program there between look and start."""
    home = tmp_path / "home"
    home.mkdir()
    env = {"PATH": os.environ["PATH"], "HOME": str(home)}
    assert subprocess.run([packed], env=env, capture_output=True, text=True).stdout == "genuine\n"
    tree = next(Path("/var/cache").glob(f"proxmon-test-{os.getpid()}/1/*"))
    prepared = home / ".cache" / tree.parent.parent.name / "1" / tree.name
    prepared.mkdir(parents=True)
    (prepared / "complete").touch()
    (prepared / tree.parent.parent.name).write_text("#!/bin/sh\necho evil\n")
    (prepared / tree.parent.parent.name).chmod(0o755)
    subprocess.run(["rm", "-rf", tree.parent.parent], check=True)
    assert subprocess.run([packed], env=env, capture_output=True, text=True).stdout == "genuine\n"


def test_a_changed_or_shortened_file_is_never_started(packed):
    whole = packed.read_bytes()
    start = whole.index(b"\nexit 1\n")
    env = {"PATH": os.environ["PATH"], "HOME": str(packed.parent / "home")}
    broken = [whole[:end] for end in range(40, len(whole), len(whole) // 12)]
    broken += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(start + 20, len(whole), 60)]
    for body in broken:
        packed.write_bytes(body)
        argv = [packed] if body.startswith(b"#!") else ["sh", packed]
        assert b"genuine" not in subprocess.run(argv, env=env, capture_output=True).stdout


# --- build.sh ---


def test_a_broken_off_apt_leaves_no_policy_behind(tmp_path):
    """With policy-rc.d in place no service of the machine would start again."""
    policy, bin = tmp_path / "policy-rc.d", tmp_path / "bin"
    bin.mkdir()
    (bin / "apt-get").write_text(f"#!/bin/sh\n[ -x {policy} ] && touch {tmp_path}/seen\nexec sleep 30\n")
    (bin / "apt-get").chmod(0o755)
    text = (ROOT / "build.sh").read_text().replace("/usr/sbin/policy-rc.d", str(policy)).replace('main "$@"', "")
    process = subprocess.Popen(["bash", "-c", text + "\napt_install caddy"], cwd=ROOT, stdout=subprocess.DEVNULL,
                               env={"PATH": f"{bin}:{os.environ['PATH']}"}, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # who runs in the background ignores it
    deadline = time.monotonic() + 10
    while not (tmp_path / "seen").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert policy.exists()
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C at a terminal
    assert process.wait(10) != 0
    assert not policy.exists()
