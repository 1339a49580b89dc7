//! The run: a bank is founded at host A, moves to B, back to A, and so on, and is examined where it ends.
//!
//! Role: the order of events. Neighbours: `process` carries the orders; `report` judges and prints. Invariants: the parent never has the database: it knows what it was told.

use crate::{
    Args,
    bank::ACCOUNT_BYTES,
    messages::{Message, Order},
    process::{Hosts, NAMES, ProcessError},
    report::{Move, Report},
};
use pageferry::PeerId;
use std::time::{Duration, Instant};

/// For what takes milliseconds.
const STEP_LIMIT: Duration = Duration::from_secs(20);
/// Filling or examining the largest database on a slow machine, in a debug build.
const BOOKS_LIMIT: Duration = Duration::from_secs(600);
/// One move: a gigabyte over a link of 100 Mbit/s takes 90 s.
const MOVE_LIMIT: Duration = Duration::from_secs(300);
/// Room for the ledger: 260,000 entries of 16 bytes (measured); a release build made 94,000 transfers a second on 2 cores.
const LEDGER_BYTES_S: u64 = 4 << 20;
/// For how much longer than the stays the ledger grows: the program runs while it moves.
const MOVE_SECONDS: u64 = 5;

/// Runs the whole of it.
///
/// # Errors
/// What ended the run before it could be proved or disproved that every transaction arrived.
pub fn run(args: &Args) -> Result<Report, ProcessError> {
    let mut hosts = Hosts::start(&args.link)?;
    let ids = [hello(&mut hosts, 0)?, hello(&mut hosts, 1)?];
    eprintln!("host A is process {}, host B process {}", hosts.pid(0), hosts.pid(1));

    let (size_bytes, moves) = (args.size_bytes(), u64::from(args.moves));
    let seconds = args.load_time().as_secs() * (moves + 1) + MOVE_SECONDS * moves;
    // The file's own overhead, such as inner nodes of the tree, is a hundredth.
    let region_bytes = size_bytes + size_bytes / 16 + (1 << 20) + seconds * LEDGER_BYTES_S;
    let accounts = size_bytes / ACCOUNT_BYTES;
    let begun = Instant::now();
    hosts.order(0, &Order::Found { accounts, region_bytes })?;
    let file_bytes = hosts.hear(0, BOOKS_LIMIT, |message| match message {
        Message::Founded { file_bytes } => Ok(file_bytes),
        other => Err(other),
    })?;
    let filled_in = begun.elapsed();
    eprintln!("the bank is open at A, {accounts} accounts");

    let (mut at, mut moves) = (0, Vec::new());
    stay(&mut hosts, at, args.load_time())?;
    for _ in 0..args.moves {
        let to = 1 - at;
        moves.push(move_over(&mut hosts, at, to, ids, args)?);
        at = to;
        stay(&mut hosts, at, args.load_time())?;
    }
    hosts.journal().end(Instant::now());
    eprintln!("examining the books at {}", NAMES[at]);
    hosts.order(at, &Order::Prove)?;
    let found = hosts.hear(at, BOOKS_LIMIT, |message| match message {
        Message::Proved(found) => Ok(found),
        other => Err(other),
    })?;
    let journal = hosts.journal();
    Ok(Report {
        way: args.strategy,
        pids: [hosts.pid(0), hosts.pid(1)],
        region_bytes,
        file_bytes,
        filled_in,
        phases: journal.phases().to_vec(),
        moves,
        acknowledged: journal.acknowledged(),
        found,
    })
}

fn hello(hosts: &mut Hosts, host: usize) -> Result<PeerId, ProcessError> {
    hosts.hear(host, STEP_LIMIT, |message| match message {
        Message::Hello(id) => Ok(id),
        other => Err(other),
    })
}

/// The program runs where it is.
fn stay(hosts: &mut Hosts, at: usize, time: Duration) -> Result<(), ProcessError> {
    hosts.journal().begin(format!("at {}", NAMES[at]), Instant::now());
    hosts.let_run(time)
}

fn move_over(hosts: &mut Hosts, at: usize, to: usize, ids: [PeerId; 2], args: &Args) -> Result<Move, ProcessError> {
    hosts.order(at, &Order::Offer { to: ids[to] })?;
    let address = hosts.hear(at, STEP_LIMIT, |message| match message {
        Message::Offered { address } => Ok(address),
        other => Err(other),
    })?;
    let name = format!("{} to {}", NAMES[at], NAMES[to]);
    hosts.journal().begin(name.clone(), Instant::now());
    hosts.order(to, &Order::Take { from: ids[at], address, way: args.strategy })?;
    hosts.hear(to, MOVE_LIMIT, |message| match message {
        Message::Taken => Ok(()),
        other => Err(other),
    })?;
    eprintln!("{name}: the program runs there");
    let arrival = hosts.hear(to, MOVE_LIMIT, |message| match message {
        Message::Arrived(arrival) => Ok(arrival),
        other => Err(other),
    })?;
    let departure = hosts.hear(at, STEP_LIMIT, |message| match message {
        Message::Departed(departure) => Ok(departure),
        other => Err(other),
    })?;
    eprintln!("{name}: every page has arrived");
    Ok(Move { name, arrival, departure })
}
