//! The end where the game begins, and from which it leaves.
//!
//! Role: the order of events there: with the other end as a process of its own, or waiting for one from another terminal. Neighbours: `player` is the game, a [`Source`] hands it over.
//! Invariants: nothing of the game is outside its region (the state that travels is what was measured); a destination that is lost before the handover ends nothing but the move.

use crate::{
    Failure, Options, destination,
    map::Map,
    messages::{Message, Order, Stage, Status},
    player::{Player, Seen},
    process::{Process, ProcessError},
    proof::Proof,
    report::Left,
    screen::{Pane, Scene, Screen},
    terminal::time,
    ticks::{Log, Part},
    world::World,
};
use indicatif::{BinaryBytes, HumanCount};
use pageferry::{Capabilities, Gate, Identity, MoveEvent, Pass, PeerId, Region, Source};
use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};
use thiserror::Error;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    sync::broadcast,
    task::spawn_blocking,
    time::timeout,
};

/// The name under which the region is migrated.
pub const REGION: &str = "meadow";
/// Every run plays the same game.
const SEED: u64 = 0x6865_7264_7321;
/// How often the screen is painted.
const LOOK: Duration = Duration::from_millis(100);
/// Ticks that show that the game goes on, after a destination was lost.
const GOES_ON: u64 = 60;
/// From the order to the destination's report, beside the play that was asked for.
const MOVE_LIMIT: Duration = Duration::from_secs(300);
/// For what takes milliseconds; a second for [`GOES_ON`].
const STEP_LIMIT: Duration = Duration::from_secs(20);

/// The destination is lost, and this is where the game is.
#[derive(Debug, Error)]
enum Lost {
    #[error(
        "{cause}\nthe game had not changed hands: it went on at the source, {made} ticks since then, {ticks} in all; the proof {} there",
        verdict(*holds)
    )]
    BeforeHandover { cause: Failure, made: u64, ticks: u64, holds: bool },
    #[error(
        "{cause}\nthe game had changed hands, so it is lost: the source still has its memory as it was at the handover, but never runs it \
         again by itself, or there might be two of it (promise S6 in docs/safety.md)"
    )]
    AfterHandover { cause: Failure },
    #[error("the destination's report did not come within {limit:?}")]
    Late { limit: Duration },
}

/// The game at home, and on offer.
struct Home {
    source: Source,
    player: Player,
    seen: Arc<Seen>,
    region: Region,
    side: usize,
    /// False ends the game here.
    running: Arc<AtomicBool>,
    events: broadcast::Receiver<MoveEvent>,
    /// Of copying, so far, and what the destination lacked when that was told last.
    rounds: u32,
    owed_bytes: u64,
    /// The last of it, for the screen.
    news: String,
}

/// Both ends: the other one is a process that this one starts. Whether the proof holds.
///
/// # Errors
/// What ended the run before that was known.
pub async fn both(options: &Options) -> Result<bool, Failure> {
    Capabilities::probe().require_userfaultfd()?;
    let mut screen = Screen::new(options.quick);
    let (mut process, peer) = Process::start(&options.arguments()).await?;
    let identity = Identity::generate()?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let mut home = Home::open(options, &identity, peer, address).await?;
    screen.say(&format!("the source is process {}, the destination process {}", std::process::id(), process.pid()));
    let order = Order { source: identity.peer_id(), address: home.source.local_addr() };
    let limit = MOVE_LIMIT + options.play_time() * 2;
    let heard = match timeout(limit, hear_out(&mut process, order, &mut home, options, &mut screen)).await {
        Ok(Ok(heard)) => Ok(heard),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(Lost::Late { limit }.into()),
    };
    let (report, holds) = match heard {
        Ok(heard) => heard,
        Err(cause) => {
            drop(process);
            drop(screen);
            return Err(home.lost(cause).await?.into());
        }
    };
    process.end().await?;
    let departed = timeout(STEP_LIMIT, home.source.departed()).await??;
    home.hear(&mut screen);
    drop(screen);
    print!("{}{report}", Left { departed, rounds: home.rounds });
    Ok(holds)
}

/// The source alone, until the game has left for another terminal, perhaps of another host.
///
/// # Errors
/// What ended it before that.
pub async fn alone(options: &Options, listen: SocketAddr, peer: Option<PeerId>, identity: &Identity) -> Result<bool, Failure> {
    Capabilities::probe().require_userfaultfd()?;
    println!("the source's id is {}", identity.peer_id());
    let peer = match peer {
        Some(peer) => peer,
        None if listen.port() == 0 => {
            return Err("with port 0 the destination's id must be given: --peer ID, or choose a port".into());
        }
        None => ask_for_peer(listen, identity.peer_id()).await?,
    };
    let mut screen = Screen::new(options.quick);
    let mut home = Home::open(options, identity, peer, listen).await?;
    screen.say(&format!("the game runs, and may be taken at {}", home.source.local_addr()));
    let mut look = tokio::time::interval(LOOK);
    let departed = loop {
        tokio::select! {
            biased;
            departed = home.source.departed() => break departed?,
            _ = look.tick() => {
                home.hear(&mut screen);
                screen.show(&Scene {
                    heading: format!("GAME, at the source, {}", home.source.local_addr()),
                    panes: vec![home.pane()],
                    recent: home.seen.log().recent(destination::RECENT),
                    figures: [home.figures(), home.news.clone()],
                });
            }
        }
    };
    home.hear(&mut screen);
    drop(screen);
    print!("{}", Left { departed, rounds: home.rounds });
    Ok(true)
}

/// The source lets nobody in whose name it was not given.
async fn ask_for_peer(listen: SocketAddr, id: PeerId) -> Result<PeerId, Failure> {
    println!("in the other terminal:\n\n  cargo run --release --example game -- destination --connect {listen} --peer {id}\n");
    println!("and then here, the id that it prints:");
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        match line.parse() {
            Ok(peer) => return Ok(peer),
            Err(_) if line.trim().is_empty() => {}
            Err(error) => println!("{error}; once more:"),
        }
    }
    Err("no id came on standard input; give it with --peer ID".into())
}

/// Shows how far the destination is until it reports what came of it.
async fn hear_out(
    process: &mut Process,
    order: Order,
    home: &mut Home,
    options: &Options,
    screen: &mut Screen,
) -> Result<(String, bool), ProcessError> {
    process.order(order).await?;
    let mut stage = None;
    loop {
        match process.next().await? {
            Message::Status(status) => {
                home.hear(screen);
                if stage.replace(status.stage) != Some(status.stage) {
                    screen.say(&destination::stage_line(&status, options));
                }
                screen.show(&home.scene(*status, options));
            }
            Message::Report { text, holds } => return Ok((text, holds)),
            other => return Err(ProcessError::OutOfTurn(Box::new(other))),
        }
    }
}

impl Home {
    async fn open(options: &Options, identity: &Identity, peer: PeerId, listen: SocketAddr) -> Result<Home, Failure> {
        let side = options.side();
        let region_bytes = World::region_bytes(side);
        let region = Region::builder().name(REGION).size(region_bytes).open()?;
        let world = {
            let region = region.clone();
            spawn_blocking(move || World::create(region, side, SEED)).await??
        };
        let (gate, running) = (Gate::new(), Arc::new(AtomicBool::new(true)));
        let go_on = {
            let (thread, running) = (gate.enter(), running.clone());
            move || running.load(Relaxed) && thread.pass() == Pass::Run
        };
        let player = Player::start(world, Log::default(), Part::Before, go_on)?;
        let seen = player.seen();
        let mut source = Source::builder(identity).grant(peer, [&region]).gate(&gate).state({
            let seen = seen.clone();
            move || seen.log().to_state()
        });
        if let Some(bytes_s) = options.bandwidth_bytes_s() {
            source = source.background_limit(bytes_s);
        }
        let source = source.listen(listen)?;
        let events = source.events();
        Ok(Home { source, player, seen, region, side, running, events, rounds: 0, owed_bytes: region_bytes, news: String::new() })
    }

    /// What happened to the move since it was heard last.
    fn hear(&mut self, screen: &mut Screen) {
        loop {
            let event = match self.events.try_recv() {
                Ok(event) => event,
                Err(broadcast::error::TryRecvError::Lagged(_)) => continue,
                Err(_) => return,
            };
            let news = match event {
                MoveEvent::Copying { round, owed_bytes, dirty_bytes_s, bandwidth_bytes_s, predicted_downtime } => {
                    let news = format!("round {round}: {} owed", BinaryBytes(owed_bytes));
                    // Before the first page has arrived there is nothing to judge by.
                    let news = match predicted_downtime.map(time).filter(|_| bandwidth_bytes_s > 0) {
                        None => news,
                        Some(pause) => {
                            let [written, carried] =
                                [dirty_bytes_s, bandwidth_bytes_s].map(|bytes_s| BinaryBytes(bytes_s).to_string());
                            format!("{news}, the game writes {written}/s, the path carries {carried}/s, it would pause for {pause}")
                        }
                    };
                    let known = self.rounds == round;
                    (self.rounds, self.owed_bytes) = (round, owed_bytes);
                    self.news.clone_from(&news);
                    if known {
                        continue;
                    }
                    news
                }
                MoveEvent::Aborted { reason } => format!("the move was called off: {reason}; the game goes on at the source"),
                MoveEvent::Committed { .. } => "the game has left the source".to_owned(),
                _ => continue,
            };
            screen.say(&news);
            self.news = news;
        }
    }

    fn pane(&self) -> Pane {
        if self.source.owns() {
            let map = Map::of(self.side, &self.region.resident_extents(), self.seen.ages());
            return Pane { title: format!("SOURCE, tick {}", HumanCount(self.seen.made())), map };
        }
        Pane { title: "SOURCE, the game has left".to_owned(), map: Map::away(self.side) }
    }

    fn figures(&self) -> String {
        let log = self.seen.log();
        let before = log.part(Part::Before);
        let [p50, p99] = [0.5, 0.99].map(|q| before.quantile(q));
        let [count, late] = [before.count, before.late].map(HumanCount);
        format!("source: {count} ticks, p50 {}, p99 {}, {late} late", time(p50), time(p99))
    }

    /// Both ends on one screen.
    fn scene(&self, status: Status, options: &Options) -> Scene {
        // Which pages it has before the handover only the library knows.
        let away = || Pane { title: format!("DESTINATION, lacks {}", BinaryBytes(self.owed_bytes)), map: Map::away(self.side) };
        let theirs = destination::pane(&status).unwrap_or_else(away);
        let figures = match status.stage {
            Stage::Waiting | Stage::Taking => [self.figures(), self.news.clone()],
            _ => [self.figures(), destination::figures(&status)],
        };
        // The destination has the source's ticks too: they travelled with the game.
        let recent = if status.recent.is_empty() { self.seen.log().recent(destination::RECENT) } else { status.recent };
        Scene { heading: format!("GAME, moving by {}", options.strategy_name()), panes: vec![self.pane(), theirs], recent, figures }
    }

    /// Finds out where the game is, once and for all: an attempt under way is called off, or has already succeeded.
    async fn lost(self, cause: Failure) -> Result<Lost, Failure> {
        self.source.cancel().await;
        if !self.source.owns() {
            return Ok(Lost::AfterHandover { cause });
        }
        let from = self.seen.made();
        let goes_on = async {
            let mut look = tokio::time::interval(LOOK);
            while self.seen.made() < from + GOES_ON {
                look.tick().await;
            }
        };
        timeout(STEP_LIMIT, goes_on).await?;
        let made = self.seen.made() - from;
        self.running.store(false, Relaxed);
        let player = self.player;
        let proof = spawn_blocking(move || Proof::of(&player.join()?)).await??;
        Ok(Lost::BeforeHandover { cause, made, ticks: proof.ticks, holds: proof.holds() })
    }
}

pub fn verdict(holds: bool) -> &'static str {
    if holds { "HOLDS" } else { "FAILS" }
}
