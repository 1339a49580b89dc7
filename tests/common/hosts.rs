//! Processes that have a program, or take it: what a chaos of moves consists of.
//!
//! Role: both sides of the pipe between a test and such a process. Neighbours: `program` is what runs there, and starts the process. Invariants: what a process
//! says is kept, so that a failure can show it; a panic anywhere in it is said and ends it.

use crate::{
    net::LOOPBACK,
    program::{Child, Ledger, Program, check, done_of, say, state_of, told, world},
};
use pageferry::{
    Destination, Identity, LossPolicy, MoveError, MoveEvent, Moved, OnLoss, Pager, PagerOptions, Region, Source, StandbyOptions,
    Strategy, TransportOptions, Trust,
};
use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

/// Such a process, as its test sees it.
pub struct Host {
    child: Option<Child>,
    said: Vec<String>,
}

impl Host {
    /// With a program that begins, or with nothing.
    pub fn start(key: &str, ledger: &Path, with_program: bool) -> Host {
        let program = if with_program { "begins" } else { "none" };
        let child = Child::play("host", &[("KEY", key), ("LEDGER", ledger.to_str().unwrap()), ("PROGRAM", program)]);
        Host { child: Some(child), said: Vec::new() }
    }

    pub fn tell(&mut self, what: &str) {
        if let Some(child) = &mut self.child {
            child.tell(what);
        }
    }

    /// Hears what it says within `limit`, once.
    pub fn listen(&mut self, limit: Duration, context: &str) {
        let Some(child) = &self.child else { return std::thread::sleep(limit) };
        match child.hear(limit) {
            Ok(Some(said)) => {
                assert!(!said.starts_with("PANIC"), "{context}: {said}, after {:?}", self.said);
                self.said.push(said);
            }
            Ok(None) => {}
            Err(()) => self.child = None,
        }
    }

    /// Waits until it says something that begins so; what follows that.
    pub fn wait(&mut self, deadline: Instant, context: &str, beginning: &str) -> String {
        let heard = self.said.len();
        loop {
            self.listen(Duration::from_millis(5), context);
            if let Some(said) = self.said[heard..].iter().find_map(|said| said.strip_prefix(beginning)) {
                return said.to_owned();
            }
            assert!(self.lives(), "{context}: it died and did not say {beginning:?}, but {:?}", self.said);
            assert!(Instant::now() < deadline, "{context}: it did not say {beginning:?} in time, but {:?}", self.said);
        }
    }

    /// Has it pause its program and compare the memory with the ledger.
    pub fn check(&mut self, deadline: Instant, context: &str) {
        self.tell("check");
        self.wait(deadline, context, "checked");
        self.said.clear();
    }

    pub fn said(&self) -> &[String] {
        &self.said
    }

    pub fn has_said(&self, beginning: &str) -> bool {
        self.has_said_any(|said| said.starts_with(beginning))
    }

    pub fn has_said_any(&self, what: impl Fn(&str) -> bool) -> bool {
        self.said.iter().any(|said| what(said))
    }

    pub fn lives(&self) -> bool {
        self.child.is_some()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(child) = self.child.take() {
            child.kill();
        }
    }
}

/// Short enough that a dead end is soon known to be one.
fn transport() -> TransportOptions {
    TransportOptions {
        idle_timeout: Duration::from_millis(1500),
        keep_alive: Duration::from_millis(300),
        connect_timeout: Duration::from_secs(1),
        ..TransportOptions::default()
    }
}

/// In the child: its life.
pub async fn play() {
    let Some(key) = told("host", "KEY") else { return };
    std::panic::set_hook(Box::new(|info| {
        say(&format!("PANIC {}", info.to_string().replace('\n', " ")));
        std::process::exit(101);
    }));
    let identity = Identity::from_pem(&key).unwrap();
    let ledger = Ledger::shared(Path::new(&told("host", "LEDGER").unwrap()));
    let mut stage = None;
    if told("host", "PROGRAM").unwrap() == "begins" {
        let regions = world(&["heap", "stack"], 300);
        let program = run(&regions, &ledger);
        stage = Some(Stage { regions, program, epoch: 1, source: None, _moved: None });
    }
    let (line, mut lines) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        std::io::stdin().lines().map_while(Result::ok).for_each(|said| drop(line.send(said)));
        // The test has ended.
        std::process::exit(1);
    });
    while let Some(said) = lines.recv().await {
        let words: Vec<&str> = said.split(' ').collect();
        match (words.as_slice(), stage.as_mut()) {
            (["offer", limit], Some(stage)) => stage.offer(&identity, &ledger, limit.parse().unwrap()),
            (["take", address, "standby"], None) => stage = stand_by(&identity, &ledger, address, &mut lines).await,
            (["take", address, strategy], None) => stage = take(&identity, &ledger, address, strategy).await,
            (["check"], Some(stage)) => stage.check(&ledger).await,
            (["cancel"], Some(stage)) => drop(stage.source().cancel().await),
            (["finalize"], Some(stage)) => drop(stage.source().finalize()),
            (["owns"], Some(stage)) => {
                // Ends what goes on: it is known then.
                stage.source().cancel().await;
                say(&format!("owns {}", stage.source().owns()));
            }
            _ => panic!("cannot {said}"),
        }
    }
}

fn run(regions: &[Region], ledger: &Arc<Ledger>) -> Program {
    Program::start_resting(regions, ledger, Duration::from_millis(1))
}

struct Stage {
    regions: Vec<Region>,
    program: Program,
    epoch: u64,
    source: Option<Source>,
    /// Keeps what is still coming.
    _moved: Option<Arc<Moved>>,
}

impl Stage {
    fn offer(&mut self, identity: &Identity, ledger: &Arc<Ledger>, limit: u64) {
        // The one before gives the program back first.
        self.source = None;
        let mut builder = Source::builder(identity).grant(identity.peer_id(), &self.regions).gate(&self.program.gate);
        if limit > 0 {
            builder = builder.background_limit(limit);
        }
        let counted = ledger.clone();
        let builder = builder.epoch(self.epoch).transport(transport()).state(move || state_of(&counted));
        let source = builder.listen(LOOPBACK).unwrap();
        let mut events = source.events();
        tokio::spawn(async move {
            while let Ok(event) = events.recv().await {
                let name = match event {
                    MoveEvent::Offered { .. } => "offered",
                    MoveEvent::Copying { .. } => "copying",
                    MoveEvent::Point { .. } => "point",
                    MoveEvent::Paused => "paused",
                    MoveEvent::Committed { .. } => "committed",
                    MoveEvent::Resumed => "resumed",
                    MoveEvent::Interrupted { .. } => "interrupted",
                    MoveEvent::Aborted { .. } => "aborted",
                    _ => continue,
                };
                say(name);
            }
        });
        say(&format!("at {}", source.local_addr()));
        self.source = Some(source);
    }

    fn source(&self) -> &Source {
        self.source.as_ref().expect("it was offered")
    }

    async fn check(&mut self, ledger: &Arc<Ledger>) {
        let gate = self.program.gate.clone();
        gate.pause(Duration::from_secs(5)).await.unwrap();
        let (regions, ledger) = (self.regions.clone(), ledger.clone());
        tokio::task::spawn_blocking(move || check(&regions, &ledger)).await.unwrap();
        gate.resume().await;
        say("checked");
    }
}

async fn take(identity: &Identity, ledger: &Arc<Ledger>, address: &str, strategy: &str) -> Option<Stage> {
    let strategy = match strategy {
        "post_copy" => Strategy::post_copy(),
        "pre_copy" => Strategy::pre_copy().downtime_limit(Duration::from_secs(1)),
        _ => Strategy::hybrid(),
    };
    let taken = async { connect(identity, address).await?.take(strategy).await };
    match taken.await {
        Ok(moved) => Some(runs_here(moved, ledger)),
        Err(error) => failed(&error),
    }
}

async fn connect(identity: &Identity, address: &str) -> Result<Destination, MoveError> {
    let loss = LossPolicy { keep_trying: Duration::from_secs(4), then: OnLoss::Poison };
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let builder = Destination::builder(address.parse().unwrap(), Trust::ids([identity.peer_id()]), identity);
    builder.pager(&pager).transport(transport()).loss(loss).decision_limit(Duration::from_secs(5)).connect().await
}

fn failed(error: &MoveError) -> Option<Stage> {
    let kind = if matches!(error, MoveError::Unknown { .. }) { "unknown" } else { "known" };
    say(&format!("failed {kind}: {error}").replace('\n', " "));
    None
}

fn runs_here(moved: Moved, ledger: &Arc<Ledger>) -> Stage {
    let regions = moved.regions().to_vec();
    let program = run(&regions, ledger);
    say(&format!("moved {}", moved.epoch()));
    let (epoch, moved) = (moved.epoch(), Arc::new(moved));
    let coming = moved.clone();
    tokio::spawn(async move {
        match coming.complete().await {
            Ok(()) => say("complete"),
            Err(error) => say(&format!("lost {error}").replace('\n', " ")),
        }
    });
    Stage { regions, program, epoch, source: None, _moved: Some(moved) }
}

/// Follows for a few points, then wants the program. If it cannot be had, the test knows whether the source is dead.
async fn stand_by(
    identity: &Identity,
    ledger: &Arc<Ledger>,
    address: &str,
    lines: &mut tokio::sync::mpsc::UnboundedReceiver<String>,
) -> Option<Stage> {
    let options = StandbyOptions { behind: Duration::from_millis(40), ..StandbyOptions::default() };
    let standby = async { connect(identity, address).await?.stand_by(options).await };
    let standby = match standby.await {
        Ok(standby) => standby,
        Err(error) => return failed(&error),
    };
    say("follows");
    let mut told = standby.events();
    let points = async {
        for _ in 0..3 {
            while !matches!(told.recv().await, Ok(MoveEvent::Kept { .. }) | Err(_)) {}
        }
    };
    // Whatever keeps them away.
    let _ = tokio::time::timeout(Duration::from_secs(1), points).await;
    let error = match standby.promote().await {
        Ok(moved) => return Some(runs_here(moved, ledger)),
        Err(error) => error,
    };
    say("wants");
    match lines.recv().await.as_deref() {
        Some("take_over") => {
            let moved = standby.take_over().await.unwrap();
            // What was written since the point is no part of the program.
            ledger.set(done_of(moved.state()));
            Some(runs_here(moved, ledger))
        }
        _ => failed(&error),
    }
}
