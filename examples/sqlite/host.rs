//! One host: a process that has the program, gives it away or takes it, as its parent orders.
//!
//! Role: runs the bank between two moves, and carries a move out at its end. Neighbours: `process` starts it and hears it; `bank` is the program, [`Source`] and [`Destination`]
//! move it. Invariants: the clerk passes the gate between two transfers and nowhere else; a transfer is acknowledged after its commit; a connection to the database never outlives
//! the program's stay at this host; it ends with its parent.

use crate::{
    bank::Bank,
    disk::Disk,
    link::Link,
    messages::{Arrival, Departure, Message, Order},
    proof::examine,
};
use pageferry::{Destination, Gate, Hop, Identity, MoveEvent, Pass, PeerId, Region, Source, Strategy, Trust};
use std::{
    error::Error,
    io::{self, Write},
    net::{Ipv4Addr, SocketAddr},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    sync::broadcast::error::TryRecvError,
    task::spawn_blocking,
};

/// The name under which the region moves.
const REGION: &str = "bank";

type Failure = Box<dyn Error + Send + Sync>;

/// Does what the parent orders on standard input, and tells on standard output how it goes.
pub async fn run(link: &Link) -> ExitCode {
    let Err(error) = serve(link).await else { return ExitCode::SUCCESS };
    if say(&Message::Failed(error.to_string())).is_err() {
        eprintln!("sqlite, host: {error}");
    }
    ExitCode::FAILURE
}

async fn serve(link: &Link) -> Result<(), Failure> {
    let mut host = Host { identity: Identity::generate()?, link, program: None };
    say(&Message::Hello(host.identity.peer_id()))?;
    let mut orders = BufReader::new(tokio::io::stdin()).lines();
    while let Some(order) = orders.next_line().await? {
        let order = Order::from_line(&order)?;
        tokio::select! {
            done = host.carry_out(order) => done?,
            // There is one order at a time: the parent has ended.
            _ = orders.next_line() => return Err("the parent ended".into()),
        }
    }
    Ok(())
}

struct Host<'a> {
    identity: Identity,
    /// Between it and the host that it takes from.
    link: &'a Link,
    program: Option<Program>,
}

impl Host<'_> {
    async fn carry_out(&mut self, order: Order) -> Result<(), Failure> {
        match order {
            Order::Found { accounts, region_bytes } => self.found(accounts, region_bytes).await,
            Order::Offer { to } => self.offer(to).await,
            Order::Take { from, address, way } => self.take(from, address, way.strategy()).await,
            Order::Prove => self.prove().await,
        }
    }

    async fn found(&mut self, accounts: u64, region_bytes: u64) -> Result<(), Failure> {
        let region = Region::builder().name(REGION).size(region_bytes).open()?;
        let (filled, accounts) = (region.clone(), u32::try_from(accounts)?);
        let fill = move || {
            let bank = Bank::found(&filled, accounts)?;
            let file_bytes = bank.len_bytes()?;
            bank.leave();
            Ok::<_, Failure>(file_bytes)
        };
        let file_bytes = spawn_blocking(fill).await??;
        say(&Message::Founded { file_bytes })?;
        self.program = Some(Program::start(region, 1)?);
        Ok(())
    }

    async fn offer(&mut self, to: PeerId) -> Result<(), Failure> {
        let program = self.program.take().ok_or("there is no program here to offer")?;
        let source = Source::builder(&self.identity)
            .grant(to, [&program.region])
            .gate(&program.gate)
            .epoch(program.epoch)
            .listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        let mut events = source.events();
        say(&Message::Offered { address: source.local_addr() })?;
        let departed = source.departed().await?;
        // The gate told the clerk to stop; its acknowledgements are all said when it has.
        spawn_blocking(move || program.join()).await??;
        let mut rounds = 0;
        loop {
            match events.try_recv() {
                Ok(MoveEvent::Copying { round, .. }) => rounds = rounds.max(u64::from(round)),
                Ok(_) | Err(TryRecvError::Lagged(_)) => {}
                Err(_) => break,
            }
        }
        Ok(say(&Message::Departed(Departure { rounds, downtime: departed.downtime, total: departed.total }))?)
    }

    async fn take(&mut self, from: PeerId, address: SocketAddr, strategy: Strategy) -> Result<(), Failure> {
        let destination = Destination::builder(address, Trust::ids([from]), &self.identity);
        let destination = destination.transport(self.link.transport()).connect().await?;
        let moved = destination.take(strategy).await?;
        let region = moved.region(REGION).ok_or_else(|| format!("no region called {REGION} came"))?;
        self.program = Some(Program::start(region.clone(), moved.epoch())?);
        say(&Message::Taken)?;
        moved.complete().await?;
        let file_bytes = Disk::insert(&region)?.len_bytes()?;
        Ok(say(&Message::Arrived(arrival(&region, file_bytes)))?)
    }

    async fn prove(&mut self) -> Result<(), Failure> {
        let program = self.program.take().ok_or("there is no program here to examine")?;
        program.quit.store(true, Relaxed);
        let examined = spawn_blocking(move || {
            let region = program.join()?;
            let bank = Bank::open(&region)?;
            Ok::<_, Failure>(examine(&bank)?)
        });
        Ok(say(&Message::Proved(examined.await??))?)
    }
}

/// The bank at work: its memory and its one thread.
struct Program {
    region: Region,
    epoch: u64,
    gate: Gate,
    quit: Arc<AtomicBool>,
    clerk: JoinHandle<Result<(), Failure>>,
}

impl Program {
    /// Runs whatever bank is in the region. Its pages need not be here yet.
    fn start(region: Region, epoch: u64) -> io::Result<Program> {
        let (gate, quit) = (Gate::new(), Arc::new(AtomicBool::new(false)));
        let clerk = {
            let (region, place, quit) = (region.clone(), gate.enter(), quit.clone());
            let run = move || work(&region, || !quit.load(Relaxed) && place.pass() == Pass::Run);
            thread::Builder::new().name("clerk".to_owned()).spawn(move || {
                let worked = run();
                if let Err(error) = &worked {
                    // Nobody may be waiting for the thread now; a parent that has gone hears nothing either.
                    let _ = say(&Message::Failed(format!("the clerk cannot go on: {error}")));
                }
                worked
            })?
        };
        Ok(Program { region, epoch, gate, quit, clerk })
    }

    /// Waits for the clerk, whom the gate or `quit` told to stop.
    fn join(self) -> Result<Region, Failure> {
        self.clerk.join().map_err(|_| "the clerk panicked")??;
        Ok(self.region)
    }
}

/// Makes transfers for as long as `goes_on` says before each, and acknowledges them.
fn work(region: &Region, goes_on: impl Fn() -> bool) -> Result<(), Failure> {
    let bank = Bank::open(region)?;
    let mut clerk = bank.clerk()?;
    while goes_on() {
        let number = clerk.transfer()?;
        writeln!(io::stdout().lock(), "{number}")?;
    }
    drop(clerk);
    bank.leave();
    Ok(())
}

fn arrival(region: &Region, file_bytes: u64) -> Arrival {
    let stats = region.stats();
    let waits = region.hops().map(|hops| hops.hop(Hop::Total));
    Arrival {
        file_pages: region.page_size().pages_for(file_bytes),
        touched: stats.pages_demand,
        beside: stats.pages_around,
        pushed: stats.pages_pull,
        faults: stats.faults,
        fault_p50: waits.map(|waits| waits.quantile(0.5)).unwrap_or_default(),
        fault_max: waits.map(|waits| waits.max()).unwrap_or_default(),
    }
}

fn say(message: &Message) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}", message.to_line())?;
    out.flush()
}
