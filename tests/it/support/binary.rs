//! The real binary as a process.

use std::{
    process::{ExitStatus, Stdio},
    time::Duration,
};

use byok_gate::grpc::convert::pb::policy_decision_service_client::PolicyDecisionServiceClient;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::{Child, Command},
    sync::watch,
    task::JoinHandle,
    time::timeout,
};
use tonic::transport::Channel;

use super::events;

/// Long enough for a debug build on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

const SERVE: [&str; 3] = ["serve", "--listen", "127.0.0.1:0"];

/// `byok-gate serve`, on a free port. Killed when it is dropped.
pub(crate) struct Serving {
    pub(crate) child: Child,
    pub(crate) address: String,
    first: String,
    /// What it has logged since then, as far as it has.
    said: watch::Receiver<String>,
    stdout: JoinHandle<String>,
    stderr: JoinHandle<String>,
}

/// All that a process wrote, and how it ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// The binary with an environment of nothing but this.
pub(crate) fn command(arguments: &[&str], environment: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_byok-gate"));
    command.args(arguments).env_clear().envs(environment.iter().copied()).stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Runs the binary to its end.
pub(crate) async fn run(arguments: &[&str], environment: &[(&str, &str)]) -> Ended {
    let output = timeout(PATIENCE, command(arguments, environment).output()).await.unwrap().unwrap();
    Ended {
        status: output.status,
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

impl Serving {
    pub(crate) async fn start(arguments: &[&str]) -> Self {
        Self::start_in(arguments, &[]).await
    }

    /// With this environment.
    pub(crate) async fn start_in(arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        Self::spawned(command(&[&SERVE, arguments].concat(), environment)).await
    }

    /// With at most this many descriptors.
    pub(crate) async fn start_with_descriptors(limit: usize) -> Self {
        let mut shell = Command::new("sh");
        let script = format!("ulimit -n {limit}; exec \"$0\" \"$@\"");
        shell.args(["-c", &script, env!("CARGO_BIN_EXE_byok-gate")]).args(SERVE).stdin(Stdio::null()).kill_on_drop(true);
        Self::spawned(shell).await
    }

    async fn spawned(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut stderr = child.stderr.take().unwrap();
        let stderr = tokio::spawn(async move {
            let mut text = String::new();
            stderr.read_to_string(&mut text).await.unwrap();
            text
        });
        let mut first = String::new();
        let address = loop {
            let mut line = String::new();
            let read = timeout(PATIENCE, lines.read_line(&mut line)).await.unwrap().unwrap();
            first.push_str(&line);
            assert!(read > 0, "it ended before it listened: {first}");
            let event: Value = serde_json::from_str(&line).unwrap_or_default();
            if event["event"] == "listening" {
                break event["address"].as_str().unwrap().to_owned();
            }
        };
        let (tell, said) = watch::channel(String::new());
        let stdout = tokio::spawn(async move {
            let mut line = String::new();
            while lines.read_line(&mut line).await.unwrap() > 0 {
                tell.send_modify(|said| said.push_str(&std::mem::take(&mut line)));
            }
            tell.borrow().clone()
        });
        Self { child, address, first, said, stdout, stderr }
    }

    /// Waits until it has logged an event of this name since it listens, or has.
    pub(crate) async fn until(&self, name: &str) -> Value {
        self.until_fits(name, |event| event["event"] == name).await
    }

    /// The same, of an event that fits.
    pub(crate) async fn until_fits(&self, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let found = |said: &str| {
            let mut events = said.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
            events.find(|event| fits(event))
        };
        let mut said = self.said.clone();
        let waiting = timeout(PATIENCE, said.wait_for(|said| found(said).is_some())).await.map(|waited| waited.unwrap().clone());
        let said = waiting.unwrap_or_else(|_| panic!("{what}: not in {}", *self.said.borrow()));
        found(&said).unwrap()
    }

    /// An event that it logged before it listened.
    pub(crate) fn event(&self, name: &str) -> Value {
        self.events(name).next().unwrap_or_else(|| panic!("no {name} in {}", self.first))
    }

    /// All of that name.
    pub(crate) fn events(&self, name: &str) -> impl Iterator<Item = Value> {
        let events = self.first.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        events.filter(move |event| event["event"] == name)
    }

    pub(crate) async fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.address)).unwrap().connect().await.unwrap()
    }

    pub(crate) async fn client(&self) -> PolicyDecisionServiceClient<Channel> {
        PolicyDecisionServiceClient::new(self.channel().await)
    }

    /// From now on it may have at most this many descriptors; open ones stay.
    #[cfg(target_os = "linux")]
    pub(crate) async fn limit_descriptors(&self, limit: usize) {
        let id = self.child.id().unwrap().to_string();
        let limits = format!("--nofile={limit}:");
        assert!(Command::new("prlimit").args(["--pid", &id, &limits]).status().await.unwrap().success());
    }

    /// Sends SIGTERM.
    pub(crate) async fn terminate(&self) {
        let id = self.child.id().unwrap().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().await.unwrap().success());
    }

    /// Waits for its end. Whatever a server logs is lines of JSON, and its decisions fit their schema.
    pub(crate) async fn ended(mut self) -> Ended {
        let status = timeout(PATIENCE, self.child.wait()).await.unwrap().unwrap();
        let stdout = self.first + &self.stdout.await.unwrap();
        if status.code().is_some() {
            events::decision_events(&stdout);
        }
        Ended { status, stdout, stderr: self.stderr.await.unwrap() }
    }
}
