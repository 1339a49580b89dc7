//! The end that takes the game over, plays on while its pages come, and proves in the end that it is the same game.
//!
//! Role: the order of events there, with a screen of its own or told to the source's through a pipe. Neighbours: `process` starts the piped one; `player` is the game. Invariants: it knows
//! of the game what the migration brings, nothing else; piped, it ends with its source.

use crate::{
    Failure, Options,
    map::Map,
    messages::{Message, Order, Stage, Status},
    player::{Player, Seen},
    proof::Proof,
    report::{Arrived, Faults},
    screen::{Pane, Scene, Screen},
    source::REGION,
    ticks::{Log, Part},
    world::World,
};
use indicatif::HumanCount;
use pageferry::{Destination, Hop, Identity, MoveError, PeerId, Region, Trust};
use std::{
    cell::RefCell,
    future::Future,
    io::{self, Write},
    net::SocketAddr,
    pin::pin,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    task::spawn_blocking,
};

/// How often the screen, or the source, is told.
const TELL: Duration = Duration::from_millis(100);
/// How long a source may take to appear, in two terminals.
const PATIENCE: Duration = Duration::from_secs(120);
/// Ticks that are shown.
pub const RECENT: usize = 240;

/// Does what the source orders on standard input, and tells on standard output how it goes.
///
/// The exit code says whether it came to a report; what that says is the source's to judge.
pub async fn piped(options: &Options) -> ExitCode {
    let told = RefCell::new(Status::default());
    let Err(error) = serve(options, &told).await else { return ExitCode::SUCCESS };
    if say(&Message::Failed(error.to_string())).is_err() {
        eprintln!("game, destination: {}", source_ended(&told.borrow()));
    }
    ExitCode::FAILURE
}

async fn serve(options: &Options, told: &RefCell<Status>) -> Result<(), Failure> {
    let identity = Identity::generate()?;
    say(&Message::Hello(identity.peer_id()))?;
    let mut orders = BufReader::new(tokio::io::stdin()).lines();
    let order = orders.next_line().await?.ok_or("the source ended before it gave an order")?;
    let Order { source, address } = Order::from_line(&order)?;
    let show = |status: Status| {
        told.replace(Status { map: None, ..status.clone() });
        say(&Message::Status(Box::new(status)))
    };
    let taken = async {
        let destination = connect(options, address, source, &identity).await?;
        take_over(&destination, options, show).await
    };
    tokio::select! {
        arrived = taken => {
            let arrived = arrived?;
            let holds = arrived.proof.holds();
            say(&Message::Report { text: arrived.to_string(), holds })?;
            Ok(())
        }
        // There is no second order: the source has ended.
        _ = orders.next_line() => Err(source_ended(&told.borrow()).into()),
    }
}

/// Takes the game from a source in another terminal, on a screen of its own. Whether the proof holds.
///
/// # Errors
/// What ended it before that was known.
pub async fn alone(options: &Options, address: SocketAddr, source: PeerId, identity: &Identity) -> Result<bool, Failure> {
    let screen = RefCell::new(Screen::new(options.quick));
    screen.borrow_mut().say(&format!("the destination's id, which the source asks for, is\n{}", identity.peer_id()));
    let until = Instant::now() + PATIENCE;
    let destination = loop {
        match connect(options, address, source, identity).await {
            Ok(destination) => break destination,
            Err(error) if Instant::now() > until => return Err(error.into()),
            // It may not have been given this end's id yet. A try takes as long as its time limits say.
            Err(error) => screen.borrow_mut().say(&format!("no source at {address} yet, or it does not let this end in: {error}")),
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    };
    let before = RefCell::new(None);
    let show = |status: Status| {
        let mut screen = screen.borrow_mut();
        if before.replace(Some(status.stage)) != Some(status.stage) {
            screen.say(&stage_line(&status, options));
        }
        if let Some(pane) = pane(&status) {
            let figures = [figures(&status), String::new()];
            let recent = status.recent;
            screen.show(&Scene { heading: "GAME, at the destination".to_owned(), panes: vec![pane], recent, figures });
        }
        Ok(())
    };
    let arrived = take_over(&destination, options, show).await?;
    drop(screen);
    print!("{arrived}");
    Ok(arrived.proof.holds())
}

/// Reaches a source over the link that was asked for.
async fn connect(options: &Options, address: SocketAddr, source: PeerId, identity: &Identity) -> Result<Destination, MoveError> {
    let destination = Destination::builder(address, Trust::ids([source]), identity);
    destination.transport(options.link.transport()).connect().await
}

/// The whole of it, from the connection to the proof. `show` is told ten times a second how far it is.
async fn take_over(
    destination: &Destination,
    options: &Options,
    mut show: impl FnMut(Status) -> io::Result<()>,
) -> Result<Arrived, Failure> {
    // The source is to be seen at play first.
    during(tokio::time::sleep(options.play_time()), &mut show, || Status { stage: Stage::Waiting, ..Status::default() }).await?;
    let taking = destination.take(options.strategy());
    let moved = during(taking, &mut show, || Status { stage: Stage::Taking, ..Status::default() }).await??;

    // The game belongs to this process now, and every microsecond is one in which nobody plays.
    let begun = Instant::now();
    let region = moved.region(REGION).ok_or_else(|| format!("no region called {REGION} came"))?;
    let missing_at_handover = region.residency().missing();
    let log = Log::from_state(moved.state()).ok_or("the game's state makes no sense")?;
    let running = Arc::new(AtomicBool::new(true));
    let player = {
        let (region, running) = (region.clone(), running.clone());
        // Attaching reads the first page, and so may wait for it.
        spawn_blocking(move || {
            let world = World::attach(region)?;
            let side = world.side();
            Ok::<_, Failure>((Player::start(world, log, Part::During, move || running.load(Relaxed))?, side))
        })
    };
    let (player, side) = player.await??;
    let seen = player.seen();
    let look = |stage| status(stage, &region, &seen, side);
    during(moved.complete(), &mut show, || look(Stage::Arriving)).await??;
    let until_last_page = begun.elapsed();
    seen.now_in(Part::After);
    during(tokio::time::sleep(options.play_time()), &mut show, || look(Stage::After)).await?;

    running.store(false, Relaxed);
    let proving = spawn_blocking(move || Proof::of(&player.join()?));
    let proof = during(proving, &mut show, || look(Stage::Proving)).await???;
    let log = seen.log();
    Ok(Arrived {
        strategy: options.strategy_name(),
        pages: region.residency().pages,
        missing_at_handover,
        until_last_page,
        faults: faults(&region),
        log,
        proof,
    })
}

/// Shows how far it is until the work is done.
async fn during<T>(
    work: impl Future<Output = T>,
    show: &mut impl FnMut(Status) -> io::Result<()>,
    look: impl Fn() -> Status,
) -> io::Result<T> {
    let mut work = pin!(work);
    let mut tick = tokio::time::interval(TELL);
    loop {
        tokio::select! {
            biased;
            done = &mut work => return Ok(done),
            _ = tick.tick() => show(look())?,
        }
    }
}

fn status(stage: Stage, region: &Region, seen: &Seen, side: usize) -> Status {
    Status {
        stage,
        missing: region.residency().missing(),
        faults: region.stats().faults,
        made: seen.made(),
        map: Some(Map::of(side, &region.resident_extents(), seen.ages())),
        recent: seen.log().recent(RECENT),
    }
}

fn faults(region: &Region) -> Faults {
    let count = region.stats().faults;
    let Some(hops) = region.hops() else { return Faults::default() };
    let waits = hops.hop(Hop::Total);
    Faults { count, p50: waits.quantile(0.5), p99: waits.quantile(0.99), max: waits.max() }
}

/// The destination's half of a screen, once there is a region.
pub fn pane(status: &Status) -> Option<Pane> {
    let title = match status.missing {
        0 => "DESTINATION, all here".to_owned(),
        missing => format!("DESTINATION, {} pages missing", HumanCount(missing)),
    };
    Some(Pane { title, map: status.map.clone()? })
}

pub fn figures(status: &Status) -> String {
    format!(
        "destination: {} ticks, {} faults, {} pages missing",
        HumanCount(status.made),
        HumanCount(status.faults),
        HumanCount(status.missing)
    )
}

/// What begins with this status.
pub fn stage_line(status: &Status, options: &Options) -> String {
    match status.stage {
        Stage::Waiting => format!("the game runs at the source for {:?}", options.play_time()),
        Stage::Taking => format!("the destination takes the game over, {}", options.strategy_name()),
        Stage::Arriving => format!("the game runs at the destination, {} pages missing", HumanCount(status.missing)),
        Stage::After => format!("every page has come; the game runs on for {:?}", options.play_time()),
        Stage::Proving => "the game has stopped; all its ticks are played again on plain memory".to_owned(),
    }
}

/// The source's process has ended: what that means depends on what was here.
fn source_ended(told: &Status) -> String {
    match told.stage {
        Stage::Waiting | Stage::Taking => "the source ended before it handed the game over, and the game with it".to_owned(),
        Stage::Arriving => {
            format!("the source ended while {} pages were missing; the game cannot go on without them", told.missing)
        }
        Stage::After | Stage::Proving => {
            "the source ended; the game has all its pages and could go on here, but there is nobody left to report to".to_owned()
        }
    }
}

fn say(message: &Message) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}", message.to_line())?;
    out.flush()
}
