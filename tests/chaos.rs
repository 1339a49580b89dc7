//! Programs that move again and again between processes, while processes are killed and paths lose, repeat, reorder, change and end.
//!
//! Goal: S3, S5 and S6 under everything at once: no lost write, no page of mixed age, never two owners, never a hang. Method: chains of hosts; each move draws its strategy, its weather
//! and one misfortune from a seed. The program counts in a ledger that all processes share, which notices a second owner at its first operation, and after each move the whole memory is
//! compared with what the ledger says.
//!
//! `CHAOS_MOVES` (100) says how many moves, `CHAOS_SEED` (1) which; `make soak` makes many. A failure prints the seed of its chain; as many moves from that seed repeat what was drawn.

#[path = "common/hosts.rs"]
mod hosts;
#[path = "common/net.rs"]
mod net;
#[path = "common/program.rs"]
mod program;
#[path = "common/proxy.rs"]
mod proxy;

use hosts::Host;
use net::{Random, userfaultfd};
use pageferry::Identity;
use program::Ledger;
use proxy::{Proxy, Weather};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// Chains side by side: most of a move is waiting.
const CHAINS: u64 = 4;
/// A move and all that follows it is over by then, or hangs: longer than the limits of both ends together.
const BOUND: Duration = Duration::from_secs(45);

/// A soak takes an hour; it says how far it is.
const TELL_EVERY: u64 = 100;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Misfortune {
    None,
    Cut { both: bool, ms: u64 },
    NewPort,
    KillSource,
    KillDestination,
    Cancel,
    Finalize,
}

/// One move, as drawn.
#[derive(Debug)]
struct Plan {
    strategy: &'static str,
    /// Bytes a second of background traffic; 0: no limit.
    limit: u64,
    misfortune: Misfortune,
    /// It comes so long after the source has said this, or the destination has.
    after: &'static str,
    delay_us: u64,
}

impl Plan {
    fn draw(random: &mut Random) -> Plan {
        let strategy = ["post_copy", "pre_copy", "hybrid", "standby"][random.below(4) as usize];
        let misfortune = match random.below(12) {
            0..4 => Misfortune::None,
            4 | 5 => Misfortune::Cut { both: random.below(2) == 0, ms: [5, 50, 300, 2_000][random.below(4) as usize] },
            6 => Misfortune::NewPort,
            7 => Misfortune::Cancel,
            8 => Misfortune::Finalize,
            9 => Misfortune::KillSource,
            _ => Misfortune::KillDestination,
        };
        let after = ["asked", "offered", "copying", "follows", "point", "paused", "committed", "resumed"][random.below(8) as usize];
        let limit = [0, 0, 8 << 20, 64 << 20][random.below(4) as usize];
        Plan { strategy, limit, misfortune, after, delay_us: random.below(3) * random.below(10_000) }
    }
}

fn weather(random: &mut Random) -> Weather {
    match random.below(3) {
        0 => Weather { lost: random.below(4), repeated: random.below(4), late: random.below(6) },
        _ => Weather::default(),
    }
}

#[test]
fn moves_lose_nothing_whatever_happens() {
    if !userfaultfd() {
        return;
    }
    let moves: u64 = std::env::var("CHAOS_MOVES").map_or(100, |moves| moves.parse().unwrap());
    let seed: u64 = std::env::var("CHAOS_SEED").map_or(1, |seed| seed.parse().unwrap());
    let start = Instant::now();
    let chains: Vec<_> =
        (0..CHAINS).map(|chain| std::thread::spawn(move || run_chain(seed + chain * 1_000_003, moves / CHAINS))).collect();
    let mut tally = Tally::default();
    for chain in chains {
        tally.add(&chain.join().expect("a chain says its seed and what went wrong"));
    }
    println!("{moves} moves from seed {seed} in {:.0?}: {tally:?}", start.elapsed());
    // What is never reached is not tested.
    assert!(moves < 100 || tally.moved * 3 > moves && tally.stayed > 0 && tally.died > 0, "{tally:?}");
    assert!(moves < 300 || tally.taken_over > 0, "{tally:?}");
}

#[derive(Debug, Default)]
struct Tally {
    moved: u64,
    stayed: u64,
    /// The program went with the process that had it, or stands still because nobody could learn who has it.
    died: u64,
    /// Of those that moved: from a standby's last point, after the source had died.
    taken_over: u64,
}

impl Tally {
    fn add(&mut self, other: &Tally) {
        (self.moved, self.stayed, self.died) = (self.moved + other.moved, self.stayed + other.stayed, self.died + other.died);
        self.taken_over += other.taken_over;
    }
}

/// What came of a move.
enum After {
    Moved(Host),
    Stayed(Host),
    Died,
}

fn run_chain(seed: u64, moves: u64) -> Tally {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger");
    std::fs::write(&path, vec![0; Ledger::BYTES as usize]).unwrap();
    let ledger = Ledger::shared(&path);
    let key = Identity::generate().unwrap().to_pem();
    let (mut random, mut tally, mut owner) = (Random(seed), Tally::default(), None);
    for number in 0..moves {
        if number > 0 && number.is_multiple_of(TELL_EVERY) {
            println!("chain of seed {seed}: {number} of {moves} moves, {tally:?}");
        }
        let (plan, weather, roll) = (Plan::draw(&mut random), weather(&mut random), random.next());
        let source = owner.take().unwrap_or_else(|| {
            ledger.reset();
            Host::start(&key, &path, true)
        });
        let context = format!("chain of seed {seed}, move {number}: {plan:?}");
        let mut moving = Move {
            plan,
            context,
            ledger: &ledger,
            deadline: Instant::now() + BOUND,
            source,
            destination: Host::start(&key, &path, false),
        };
        moving.happen(weather, roll);
        tally.taken_over += u64::from(moving.destination.has_said("wants") && moving.destination.has_said("moved"));
        match moving.settle() {
            After::Moved(host) => (tally.moved, owner) = (tally.moved + 1, Some(host)),
            After::Stayed(host) => (tally.stayed, owner) = (tally.stayed + 1, Some(host)),
            After::Died => tally.died += 1,
        }
    }
    tally
}

struct Move<'a> {
    plan: Plan,
    context: String,
    ledger: &'a Arc<Ledger>,
    deadline: Instant,
    source: Host,
    destination: Host,
}

impl Move<'_> {
    fn happen(&mut self, weather: Weather, roll: u64) {
        let Plan { strategy, limit, misfortune, after, delay_us } = self.plan;
        self.source.tell(&format!("offer {limit}"));
        let address = self.source.wait(self.deadline, &self.context, "at ");
        let proxy = Proxy::in_weather(address.parse().unwrap(), weather, roll);
        self.destination.tell(&format!("take {} {strategy}", proxy.address));
        let decided = |said: &str| said.starts_with("moved") || said.starts_with("failed");
        // Whatever is never said does not come: the misfortune does then, or never, if it is over before.
        while after != "asked"
            && !self.source.has_said(after)
            && !self.destination.has_said(after)
            && !self.destination.has_said_any(decided)
            && Instant::now() < self.deadline
        {
            self.source.listen(Duration::from_millis(1), &self.context);
            self.destination.listen(Duration::ZERO, &self.context);
        }
        std::thread::sleep(Duration::from_micros(delay_us));
        match misfortune {
            Misfortune::None => {}
            Misfortune::Cut { both, ms } => {
                proxy.to_source(false);
                proxy.to_destination(!both);
                std::thread::sleep(Duration::from_millis(ms));
                proxy.both(true);
            }
            Misfortune::NewPort => proxy.change_port(),
            Misfortune::KillSource => self.source.kill(),
            Misfortune::KillDestination => self.destination.kill(),
            Misfortune::Cancel => self.source.tell("cancel"),
            Misfortune::Finalize => self.source.tell("finalize"),
        }
        let mut answered = false;
        while self.destination.lives() && !self.destination.has_said_any(decided) {
            if self.destination.has_said("wants") && !answered {
                answered = true;
                // The word is given when it is true.
                let word = if self.source.lives() { "leave" } else { "take_over" };
                self.destination.tell(word);
            }
            assert!(Instant::now() < self.deadline, "{}: neither moved nor failed in time: {self:?}", self.context);
            self.destination.listen(Duration::from_millis(5), &self.context);
            self.source.listen(Duration::ZERO, &self.context);
        }
        if self.destination.has_said("moved") && self.source.lives() {
            // Over the path that it has.
            while self.destination.lives() && !self.destination.has_said("complete") {
                assert!(!self.destination.has_said("lost"), "{}: pages were lost of a source that lives: {self:?}", self.context);
                assert!(Instant::now() < self.deadline, "{}: the pages did not come in time: {self:?}", self.context);
                self.destination.listen(Duration::from_millis(5), &self.context);
            }
        }
    }

    fn settle(mut self) -> After {
        let owns = self.source.lives().then(|| {
            self.source.tell("owns");
            self.source.wait(self.deadline, &self.context, "owns ") == "true"
        });
        let moved = self.destination.has_said("moved");
        assert!(!(moved && owns == Some(true)), "{}: two owners: {self:?}", self.context);
        if moved {
            if self.plan.misfortune == Misfortune::KillSource {
                // What was lacking is lost with the source, which costs the program its life if it touches that.
                while self.destination.lives() && !self.destination.has_said("complete") && !self.destination.has_said("lost") {
                    assert!(Instant::now() < self.deadline, "{}: no end to waiting for a dead source: {self:?}", self.context);
                    self.destination.listen(Duration::from_millis(5), &self.context);
                }
            }
            if self.destination.has_said("lost") || !self.destination.lives() {
                let by_us = matches!(self.plan.misfortune, Misfortune::KillSource | Misfortune::KillDestination);
                assert!(by_us, "{}: the program died by itself: {self:?}", self.context);
                return After::Died;
            }
            self.destination.check(self.deadline, &self.context);
            return After::Moved(self.destination);
        }
        match owns {
            Some(true) => {
                let before = self.ledger.done();
                while self.ledger.done().iter().zip(before).any(|(now, before)| *now < before + 3) {
                    assert!(Instant::now() < self.deadline, "{}: the program does not run on: {self:?}", self.context);
                    self.source.listen(Duration::from_millis(1), &self.context);
                }
                self.source.check(self.deadline, &self.context);
                After::Stayed(self.source)
            }
            // Nobody runs it.
            Some(false) | None => {
                let unknown = self.destination.has_said("failed unknown");
                let died = !self.destination.lives() || owns.is_none();
                assert!(unknown || died, "{}: nobody has the program: {self:?}", self.context);
                let before = self.ledger.done();
                std::thread::sleep(Duration::from_millis(5));
                assert_eq!(self.ledger.done(), before, "{}: a program runs that nobody owns", self.context);
                After::Died
            }
        }
    }
}

impl std::fmt::Debug for Move<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the source said {:?}, the destination {:?}", self.source.said(), self.destination.said())
    }
}

/// The process that has a program, or will. It is told what to do by the lines of its standard input.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn host() {
    hosts::play().await;
}
