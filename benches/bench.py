"""What the scripts of this folder share: building, starting, calling, counting. Only Python's standard library."""
import json, os, pathlib, re, shutil, signal, socket, statistics, subprocess, sys, tempfile, time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATH = "/byokgate.v1.PolicyDecisionService/"
# The server has one core to itself, and the load generator the other: the numbers are those of one core.
SERVER_CORE, LOAD_CORE = "0", "1"
IMAGE_TARGET = "x86_64-unknown-linux-musl"


def need(**packages):
    """Installs the Debian packages of the commands that are missing."""
    missing = sorted({package for command, package in packages.items() if not shutil.which(command)})
    if missing:
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        subprocess.run(["apt-get", "install", "-y", "-qq", *missing], check=True, stdout=subprocess.DEVNULL)


def build(*names):
    """These executables of this folder. CARGO_PROFILE_RELEASE_STRIP=none in the environment leaves the names in that callgrind shows."""
    found = made("--package=byok-gate-benches", *(f"--bin={name}" for name in names))
    return [found[name] for name in names]


def gate(profile="release", *target):
    """The service's own executable."""
    return made("--bin=byok-gate", *target, profile=profile)["byok-gate"]


def image_gate():
    """The executable that deploy/image/build puts into the image."""
    subprocess.run(["rustup", "--quiet", "target", "add", IMAGE_TARGET], check=True)
    os.environ.setdefault(f"CC_{IMAGE_TARGET.replace('-', '_')}", "gcc")
    return gate("image", f"--target={IMAGE_TARGET}")


def made(*what, profile="release"):
    """Executables by their targets' names."""
    command = ["cargo", "build", "--locked", f"--profile={profile}", "--message-format=json-render-diagnostics", *what]
    built = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if built.returncode:
        sys.exit("the build failed")
    lines = (json.loads(line) for line in built.stdout.splitlines() if line.startswith("{"))
    return {line["target"]["name"]: line["executable"] for line in lines if line.get("executable")}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Bench:
    """A folder with everything that is measured, and the processes started for it."""

    def __init__(self, gate, kit):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="byok-gate-bench-"))
        # Apart from the logs: the service checks its files whenever something changes in their folder.
        self.config = self.folder / "config"
        self.config.mkdir()
        self.gate, self.kit, self.processes = gate, kit, []
        subprocess.run([kit, "frames", self.folder], check=True)
        self.provider_address = f"127.0.0.1:{free_port()}"
        self.start("provider", [kit, "provider", self.provider_address], core=LOAD_CORE)
        self.documents()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            elif process.returncode not in (0, -signal.SIGTERM):
                print(f"ended by itself: {process.args[3:]}\n{process.log.read_text()[-2000:]}", file=sys.stderr)
            process.wait()
        shutil.rmtree(self.folder)

    def documents(self):
        """The embedded registry, with one provider at the fake's address, with the probes of its real host."""
        registry = (ROOT / "src/core/registry/default.yaml").read_text()
        registry = registry.replace("https://api.anthropic.com/v1", f"http://{self.provider_address}/v1")
        (self.config / "registry.yaml").write_text(registry)
        (self.config / "catalogue.yaml").write_text(f"""catalogue_version: 1
hosts:
  - host: "{self.provider_address}"
    vendor: anthropic
    probes:
      - name: models
        path: "/v1/models?limit=1"
        auth: [x-api-key]
        headers: {{anthropic-version: "2023-06-01"}}
        refuses_bad_keys: true
        expect: [data]
        signals: &signals
          - {{status: [401], path: error.type, equals: authentication_error, verdict: INVALID}}
          - {{status: [429], path: error.type, equals: rate_limit_error, verdict: RATE_LIMITED}}
      - name: completion
        method: POST
        path: "/v1/messages"
        auth: [x-api-key]
        headers: {{anthropic-version: "2023-06-01"}}
        body: {{model: "{{model}}", max_tokens: 1, messages: [{{role: user, content: "."}}]}}
        costs_money: true
        refuses_bad_keys: true
        expect: [content]
        signals: *signals
""")

    def start(self, name, command, core=SERVER_CORE, under=()):
        log = self.folder / f"{name}.log"
        with open(log, "wb") as out:
            process = subprocess.Popen(["taskset", "-c", core, *under, *map(str, command)], stdout=out, stderr=out)
        process.log = log
        self.processes.append(process)
        return process

    def serve(self, name, listen, *flags, config="", under=(), gate=None):
        """A gate with production's defaults: limits and the decision log on. Its log goes to a file."""
        (self.config / f"{name}.yaml").write_text(config)
        command = [gate or self.gate, "serve", "--allow-loopback-http", "--platform-proxy", "available"]
        command += ["--registry", self.config / "registry.yaml", "--probe-catalog", self.config / "catalogue.yaml"]
        command += ["--config", self.config / f"{name}.yaml"]
        for address in listen:
            command += ["--listen", address]
        return self.start(name, [*command, *flags], under=under)

    def stop(self, process):
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        self.processes.remove(process)

    def kit_says(self, *words):
        """The result of one of the kit's measurements."""
        command = ["taskset", "-c", LOAD_CORE, self.kit, *map(str, words)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(map(str, words))} failed")
        return json.loads(done.stdout)

    def frame(self, name):
        return self.folder / f"{name}.frame"


def reach(address):
    """How curl and h2load reach an address: `HOST:PORT`, `tls:HOST:PORT` or `unix:PATH`."""
    if address.startswith("unix:"):
        return "http://localhost", ["--unix-socket", address[5:]], ["-B", address]
    if address.startswith("tls:"):
        return f"https://{address[4:]}", ["--insecure"], []
    return f"http://{address}", [], []


def ask(address, path, frame, patience=120):
    """One answer as a gRPC frame, once the server answers at all. Ends the run unless its grpc-status is 0: errors are not
    throughput."""
    url, curl, _ = reach(address)
    command = ["curl", "-sS", "--max-time", "60", *curl, "-H", "content-type: application/grpc", "-H", "te: trailers"]
    command += ["--http2-prior-knowledge"] if url.startswith("http:") else ["--http2"]
    command += ["--data-binary", f"@{frame}", "-D", "-", "-o", f"{frame}.answer", url + path]
    until = time.monotonic() + patience
    while True:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            break
        if time.monotonic() > until:
            sys.exit(f"{address} does not answer: {done.stderr}")
        time.sleep(0.02)
    status = re.search(r"^grpc-status: (\d+)", done.stdout, re.M)
    if not status or status[1] != "0":
        sys.exit(f"{address}{path} with {frame.name}: {done.stdout}")
    return pathlib.Path(f"{frame}.answer").read_bytes()


def load(address, path, frame, requests, clients, streams, core=LOAD_CORE):
    """h2load's requests per second and mean time per request in microseconds."""
    url, _, h2load = reach(address)
    command = ["taskset", "-c", core, "h2load", "-n", str(requests), "-c", str(clients), "-m", str(streams), "-t", "1", "-w", "20"]
    command += ["-W", "24", *h2load, "-d", str(frame), "-H", "content-type: application/grpc", "-H", "te: trailers", url + path]
    done = subprocess.run(command, capture_output=True, text=True)
    good = re.search(r"(\d+) succeeded, 0 failed, 0 errored", done.stdout)
    if not good or int(good[1]) != requests:
        sys.exit(f"h2load at {address}: {done.stdout}{done.stderr}")
    rate = float(re.search(r"finished in [^,]+, ([\d.]+) req/s", done.stdout)[1])
    mean = re.search(r"time for request:\s+\S+\s+\S+\s+([\d.]+)(us|ms|s)", done.stdout)
    return rate, float(mean[1]) * {"us": 1, "ms": 1e3, "s": 1e6}[mean[2]]


def paired(first, second, slices):
    """Alternating slices, A B B A; the median of each, and the median of the paired ratios. A disturbance hits both of a pair."""
    pairs = []
    for index in range(slices):
        order = [first, second] if index % 2 == 0 else [second, first]
        results = [measure() for measure in order]
        pairs.append(results if index % 2 == 0 else results[::-1])
    column = lambda of, at: statistics.median(pair[of][at] for pair in pairs)
    ratio = lambda at: statistics.median(pair[0][at] / pair[1][at] for pair in pairs)
    return {"rate": [column(0, 0), column(1, 0)], "mean": [column(0, 1), column(1, 1)], "rate_ratio": ratio(0), "mean_ratio": ratio(1)}


def instructions(start, drive, folder, few=1000, many=3000):
    """Instructions per request, in one process that callgrind counts: of `many` requests after `few` that are not counted.

    `start` takes the prefix of its command and returns the process, which answers by then; `drive` sends this many requests."""
    process = start(["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/callgrind.out", "-q"])
    # taskset and valgrind replace themselves, so the process is the server.
    dump = lambda: subprocess.run(["callgrind_control", "--dump", str(process.pid)], check=True, capture_output=True)
    drive(few)
    dump()
    drive(many)
    dump()
    newest = max(folder.glob("callgrind.out.*"), key=lambda path: int(path.suffix[1:]))
    counted = total(newest)
    process.terminate()
    process.wait(timeout=120)
    for path in folder.glob("callgrind.out*"):
        path.unlink()
    return counted / many


def total(path):
    """All instructions of one profile, over its threads."""
    return sum(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("totals:"))


def resident(process):
    """Resident memory in MiB."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def descriptors(process):
    return len(list(pathlib.Path(f"/proc/{process.pid}/fd").iterdir()))


def descriptors_left(process, at_rest, patience=120):
    """How many are open once the load has ended. Those to the provider close when idle for long enough."""
    deadline = time.monotonic() + patience
    while (left := descriptors(process)) > at_rest + 1 and time.monotonic() < deadline:
        time.sleep(1)
    return left


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])
