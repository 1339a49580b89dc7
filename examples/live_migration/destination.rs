//! Process B: takes the program over, and tells what came of it.
//!
//! Role: goes on where the source stopped, while pages arrive behind it. Neighbours: `process` starts it and hears it; `load` is the
//! program. Invariants: it knows what the migration brings, and the [`Order`], nothing else of the source; it ends with its source.

use crate::{
    index::{Index, IndexError},
    ledger::verify,
    link::Link,
    load::{Load, View, decode},
    messages::{Arrival, Message, Order, Outcome, Stage, Status},
    proof::digest,
    search::tell,
    source::REGION,
    timeline::Clock,
};
use pageferry::{Destination, Hop, Identity, MoveEvent, Moved, Region, Strategy, Trust};
use std::{
    error::Error,
    future::Future,
    io::{self, Write},
    pin::pin,
    process::ExitCode,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    sync::broadcast,
    task::spawn_blocking,
};

type Failure = Box<dyn Error + Send + Sync>;

/// How often the source is told how far it is.
const TELL: Duration = Duration::from_millis(100);

/// Does what the source orders on standard input, and tells on standard output how it goes.
pub async fn run(link: &Link) -> ExitCode {
    let told = Told::default();
    let Err(error) = serve(link, &told).await else { return ExitCode::SUCCESS };
    if say(&Message::Failed(error.to_string())).is_err() {
        eprintln!("live_migration, destination: {}", told.source_ended());
    }
    ExitCode::FAILURE
}

async fn serve(link: &Link, told: &Told) -> Result<(), Failure> {
    let identity = Identity::generate()?;
    say(&Message::Hello(identity.peer_id()))?;
    let mut orders = BufReader::new(tokio::io::stdin()).lines();
    let order = orders.next_line().await?.ok_or_else(|| told.source_ended())?;
    let order = Order::from_line(&order)?;
    tokio::select! {
        outcome = take_over(&order, (&identity, link), told) => Ok(say(&Message::Outcome(Box::new(outcome?)))?),
        // There is no second order: the source has ended.
        _ = orders.next_line() => Err(told.source_ended().into()),
    }
}

async fn take_over(order: &Order, (identity, link): (&Identity, &Link), told: &Told) -> Result<Outcome, Failure> {
    let clock = Clock::since(order.epoch_unix_ns);
    let taken = async {
        let destination = Destination::builder(order.address, Trust::ids([order.source]), identity);
        let destination = destination.transport(link.transport()).connect().await?;
        let moved = destination.take(Strategy::post_copy()).await?;
        Ok::<_, Failure>((destination, moved))
    };
    let (destination, moved) = told.during(taken, |_| {}).await??;

    // The program belongs to this process now.
    let begun = Instant::now();
    let region = moved.region(REGION).ok_or_else(|| format!("no region called {REGION} came"))?;
    let running = Arc::new(AtomicBool::new(true));
    let load = {
        let (region, states, running) = (region.clone(), decode(moved.state())?, running.clone());
        let gate_of = move |_| gate(&running);
        // Attaching to the index faults, and so blocks.
        spawn_blocking(move || Load::start(&region, &states, clock, gate_of)).await??
    };
    let arrived = follow(&moved, &region, &load.view(), told).await;
    let until_last_page = begun.elapsed();
    arrived?;
    load.mark();
    let view = load.view();
    told.during(tokio::time::sleep(order.load), |status| status.move_on(Stage::After, &view)).await?;

    running.store(false, Relaxed);
    let arrival = arrival_of(&region, until_last_page);
    let ask = order.ask.clone();
    let concluded = spawn_blocking(move || conclude(load, &region, arrival, &ask));
    let outcome = told.during(concluded, |status| status.move_on(Stage::Proving, &view)).await???;
    drop((moved, destination));
    Ok(outcome)
}

/// Open until `running` is false.
fn gate(running: &Arc<AtomicBool>) -> impl FnMut() -> bool + Send + use<> {
    let running = Arc::clone(running);
    move || running.load(Relaxed)
}

/// Waits until every page is here.
async fn follow(moved: &Moved, region: &Region, view: &View, told: &Told) -> Result<(), Failure> {
    let mut events = moved.events();
    let look = |status: &mut Status| {
        status.move_on(Stage::Arriving, view);
        status.faults = region.stats().faults;
        status.pages = region.residency().pages;
        loop {
            match events.try_recv() {
                Ok(MoveEvent::Progress { resident_pages, .. }) => status.resident_pages = resident_pages,
                Ok(_) | Err(broadcast::error::TryRecvError::Lagged(_)) => {}
                Err(_) => break,
            }
        }
    };
    told.during(moved.complete(), look).await??;
    Ok(())
}

/// What a region's statistics say, when all its pages have come.
fn arrival_of(region: &Region, until_last_page: Duration) -> Arrival {
    let stats = region.stats();
    let waits = region.hops().map(|hops| hops.hop(Hop::Total));
    let quantile = |q| waits.map(|waits| waits.quantile(q)).unwrap_or_default();
    let pages = stats.pages_demand + stats.pages_around + stats.pages_pull;
    Arrival {
        until_last_page,
        faults: stats.faults,
        fault_p50: quantile(0.5),
        fault_p99: quantile(0.99),
        fault_max: waits.map(|waits| waits.max()).unwrap_or_default(),
        pages_demand: stats.pages_demand,
        pages_around: stats.pages_around,
        pages_pull: stats.pages_pull,
        pages_zero: stats.pages_zero,
        moved_bytes: pages * region.page_size().bytes(),
    }
}

/// Waits for the load, which its gates end, verifies the ledger, digests the region and asks it for the words `ask`.
fn conclude(load: Load, region: &Region, arrival: Arrival, ask: &str) -> Result<Outcome, Failure> {
    let observed = load.join()?;
    let index = Index::attach(region)?;
    let totals = verify(&index, &observed.states)?;
    let sample = tell(&index, ask)?;
    let digest = digest(region).map_err(IndexError::from)?.to_hex().to_string();
    Ok(Outcome { observed, arrival, totals, digest, sample })
}

impl Status {
    fn move_on(&mut self, stage: Stage, view: &View) {
        if stage != Stage::Arriving {
            self.resident_pages = self.pages;
        }
        (self.stage, self.operations) = (stage, view.operations());
    }
}

/// What the source was told last.
#[derive(Default)]
struct Told(Mutex<Status>);

impl Told {
    /// Tells the source how far it is until the work is done; `look` brings the status up to date.
    async fn during<T>(&self, work: impl Future<Output = T>, mut look: impl FnMut(&mut Status)) -> io::Result<T> {
        let mut work = pin!(work);
        let mut tick = tokio::time::interval(TELL);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return Ok(done),
                _ = tick.tick() => {
                    let status = {
                        let mut status = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                        look(&mut status);
                        *status
                    };
                    say(&Message::Status(status))?;
                }
            }
        }
    }

    /// The source's process has ended: what that means depends on what was here.
    fn source_ended(&self) -> String {
        let Status { stage, resident_pages, pages, .. } = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match stage {
            Stage::Taking => "the source ended before it handed the program over, and the program with it".to_owned(),
            Stage::Arriving => format!(
                "the source ended while pages arrived, {resident_pages} of {pages} at the last look; the program cannot go on without \
                 the others: with post-copy both ends must live until the last page has moved"
            ),
            Stage::After | Stage::Proving => "the source ended; the program has all its pages and could run on here, but there \
                 is nobody left to report to"
                .to_owned(),
        }
    }
}

fn say(message: &Message) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}", message.to_line())?;
    out.flush()
}
