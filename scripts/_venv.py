"""For the scripts beside it: run in the project's own virtual environment, which is made at the first need.

Runs on any Python 3 with the standard library alone.
"""

import hashlib
import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "Scripts" if os.name == "nt" else "bin", "python.exe" if os.name == "nt" else "python")
OLDEST = (3, 10)


def say(text, file=None):
    print(text, file=file or sys.stdout, flush=True)


def fail(text):
    """End with one clear line."""
    sys.stdout.flush()
    sys.exit("%s: %s" % (os.path.basename(sys.argv[0]), text))


def run_inside(extras=""):
    """Return if this is the environment's Python with the project installed; otherwise arrange it and start anew."""
    wanted = _fingerprint(extras)
    stamp = os.path.join(VENV, "segment-durable-%s" % (extras or "plain").replace(",", "-"))
    if os.path.realpath(sys.prefix) == os.path.realpath(VENV) and _read(stamp) == wanted:
        return
    if os.environ.get("SEGMENT_DURABLE_IN_VENV"):
        fail("the environment %s could not be entered; remove it and try again" % VENV)
    if not _works(PYTHON):
        _make(_find_python())
    if _read(stamp) != wanted:
        target = ROOT + ("[%s]" % extras if extras else "")
        say("Installing the project and what it needs into .venv (once; takes a minute) ...", sys.stderr)
        command = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--editable", target]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        if done.returncode:
            sys.stderr.write(done.stdout)
            fail("pip could not install the project: see its words above (is there a way to the package index?)")
        with open(stamp, "w") as file:
            file.write(wanted)
        say("Installed.", sys.stderr)
    os.environ["SEGMENT_DURABLE_IN_VENV"] = "1"
    arguments = [PYTHON, os.path.abspath(sys.argv[0]), *sys.argv[1:]]
    sys.stdout.flush()
    if os.name == "nt":
        sys.exit(subprocess.call(arguments))
    os.execv(PYTHON, arguments)


def _fingerprint(extras):
    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
        return hashlib.sha256(file.read() + extras.encode()).hexdigest()


def _read(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return None


def _works(python):
    """Whether that is a Python that is new enough."""
    check = "import sys; sys.exit(sys.version_info < %r)" % (OLDEST,)
    try:
        return subprocess.call([python, "-c", check], stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def _find_python():
    names = [sys.executable, *("python3.%d" % minor for minor in range(14, OLDEST[1] - 1, -1)), "python3"]
    for name in names:
        if name and (os.path.isabs(name) or shutil.which(name)) and _works(name):
            return name
    fail("needs Python %d.%d or newer; this is %s" % (OLDEST[0], OLDEST[1], sys.version.split()[0]))
    return None


def _make(python):
    say("Making a virtual environment in .venv ...", sys.stderr)
    shutil.rmtree(VENV, ignore_errors=True)
    done = subprocess.run(
        [python, "-m", "venv", VENV], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True
    )
    if done.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        sys.stderr.write(done.stdout)
        fail("could not make .venv: on Debian and Ubuntu install the package python3-venv first")
