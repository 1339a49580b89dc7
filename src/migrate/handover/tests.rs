//! Runs every order of deliveries, losses, repeats and time-outs between the two real state machines.
//!
//! Goal: S6. Method: breadth-first over all states of a world of one source, two destinations of different sessions and the messages between them; a message
//! may be delivered, delivered and kept (a repeat), or lost; streams may end and deadlines may pass at any moment, a bounded number of times.

use super::*;
use std::collections::{HashSet, VecDeque};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Message {
    Take,
    Offer,
    Mapped,
    Prepare,
    Ready,
    Commit,
    Complete,
    Released,
    Abort,
    Depose,
    Deposed,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct World {
    source: SourceHandover,
    /// Whether the program's threads may run at the source.
    source_runs: bool,
    /// Counts the stretches in which the program ran at the source: the state sent in one is stale in the next.
    source_version: u64,
    ever_committed: bool,
    freed: bool,
    destinations: Vec<DestinationHandover>,
    /// The version of the state that each holds.
    held_version: Vec<u64>,
    destination_runs: Vec<bool>,
    /// Whether destinations stand by, and may take over without the source's word.
    standby: bool,
    /// Those that did.
    took_over: Vec<bool>,
    deposed: bool,
    /// Messages on the way, sorted: destination, whether to the source, message, epoch, version of the state.
    wire: Vec<Item>,
    faults_left: u32,
}

type Item = (usize, bool, Message, u64, u64);

fn session(destination: usize) -> SessionId {
    destination as SessionId + 10
}

impl World {
    fn new(destinations: usize, faults_left: u32) -> World {
        World {
            source: SourceHandover::new(1),
            source_runs: true,
            source_version: 1,
            ever_committed: false,
            freed: false,
            destinations: vec![DestinationHandover::new(); destinations],
            held_version: vec![0; destinations],
            destination_runs: vec![false; destinations],
            standby: false,
            took_over: vec![false; destinations],
            deposed: false,
            wire: (0..destinations).map(|d| (d, true, Message::Take, 0, 0)).collect(),
            faults_left,
        }
    }

    fn of_standbys(destinations: usize, faults_left: u32) -> World {
        World { standby: true, ..World::new(destinations, faults_left) }
    }

    fn send(&mut self, item: Item) {
        self.wire.push(item);
        self.wire.sort_unstable();
    }

    fn at_source(&mut self, d: usize, event: SourceEvent) {
        let version = self.source_version;
        match self.source.on(event) {
            // How long it takes is the world's choice: it says so when it is done.
            SourceAction::Ignore => {}
            SourceAction::Copy(turn) => {
                // Said before the first page is sent, so that whoever holds a point is known.
                if self.standby {
                    assert_eq!(self.source.on(SourceEvent::StandsBy(turn)), SourceAction::Ignore);
                }
            }
            SourceAction::SendOffer(turn) => self.send((d, false, Message::Offer, turn.epoch, 0)),
            SourceAction::PauseAndPrepare(turn) => {
                self.source_runs = false;
                self.send((d, false, Message::Prepare, turn.epoch, version));
            }
            SourceAction::StopAndCommit(turn) => {
                assert!(!self.source_runs && !self.ever_committed, "committed while running, or twice");
                assert!(!self.deposed, "committed what it does not own");
                self.ever_committed = true;
                self.send((d, false, Message::Commit, turn.epoch, 0));
            }
            SourceAction::CommitAgain(turn) => self.send((d, false, Message::Commit, turn.epoch, 0)),
            action @ (SourceAction::Resume | SourceAction::ResumeAndOffer(_)) => {
                assert!(!self.ever_committed && !self.deposed, "resumed after the commit");
                self.source_runs = true;
                self.source_version += 1;
                if let SourceAction::ResumeAndOffer(turn) = action {
                    self.send((d, false, Message::Offer, turn.epoch, 0));
                }
            }
            SourceAction::Release(turn) => {
                assert!(!self.freed, "freed twice: the memory may be in use again");
                self.freed = true;
                self.send((d, false, Message::Released, turn.epoch, 0));
            }
            SourceAction::ReleasedAgain(turn) => self.send((d, false, Message::Released, turn.epoch, 0)),
            SourceAction::StopAndSayDeposed(turn) => {
                (self.source_runs, self.deposed) = (false, true);
                self.send((d, false, Message::Deposed, turn.epoch, 0));
            }
            SourceAction::Refuse => self.send((d, false, Message::Abort, 0, 0)),
        }
    }

    fn at_destination(&mut self, d: usize, event: DestinationEvent) {
        let action = self.destinations[d].on(event);
        let epoch = self.destinations[d].epoch();
        match action {
            DestinationAction::Ignore | DestinationAction::Finish | DestinationAction::GiveUp => {}
            DestinationAction::MapAndSayMapped => self.send((d, true, Message::Mapped, epoch, 0)),
            DestinationAction::SendReady => self.send((d, true, Message::Ready, epoch, 0)),
            DestinationAction::Run => {
                assert_eq!(self.held_version[d], self.source_version, "runs with a state that is stale");
                self.destination_runs[d] = true;
            }
            DestinationAction::RunAndDepose => {
                (self.destination_runs[d], self.took_over[d]) = (true, true);
                self.send((d, true, Message::Depose, epoch, 0));
            }
            DestinationAction::SendComplete => self.send((d, true, Message::Complete, epoch, 0)),
            DestinationAction::AskAgain => self.send((d, true, Message::Take, 0, 0)),
        }
    }

    fn deliver(&mut self, (d, to_source, message, epoch, version): Item) {
        let turn = Turn { session: session(d), epoch };
        match (to_source, message) {
            (true, Message::Take) => self.at_source(d, SourceEvent::Take(session(d))),
            (true, Message::Mapped) => self.at_source(d, SourceEvent::Mapped(turn)),
            (true, Message::Ready) => self.at_source(d, SourceEvent::Ready(turn)),
            (true, Message::Complete) => self.at_source(d, SourceEvent::Complete(turn)),
            (true, Message::Depose) => self.at_source(d, SourceEvent::Depose(turn)),
            // Ends the asking.
            (false, Message::Deposed) => {}
            (false, Message::Offer) => self.at_destination(d, DestinationEvent::Offer { epoch }),
            (false, Message::Prepare) => {
                // What the shell keeps is what the machine let it answer with READY.
                if self.destinations[d].state() == DestinationState::Mapped && self.destinations[d].epoch() == epoch {
                    self.held_version[d] = version;
                }
                self.at_destination(d, DestinationEvent::Prepared { epoch });
            }
            (false, Message::Commit) => self.at_destination(d, DestinationEvent::Commit { epoch }),
            (false, Message::Released) => self.at_destination(d, DestinationEvent::Released { epoch }),
            (false, Message::Abort) => self.at_destination(d, DestinationEvent::Abort),
            (to_source, message) => unreachable!("{message:?} is not sent that way ({to_source})"),
        }
    }

    /// The end of the attempt that the source is in, if it is one of `d`.
    fn source_failure(&self, d: usize) -> Option<SourceEvent> {
        match self.source.state() {
            SourceState::Offered(turn) | SourceState::Copying(turn) | SourceState::Paused(turn) | SourceState::Committed(turn)
                if turn.session == session(d) =>
            {
                Some(SourceEvent::Failed(turn))
            }
            _ => None,
        }
    }

    fn check(&self) {
        let owners = usize::from(self.source_runs) + self.destination_runs.iter().filter(|runs| **runs).count();
        // Whoever gives a standby the word says that the source runs no more: if that is not so, two run until the source is told.
        let by_word = self.took_over.iter().filter(|took| **took).count();
        assert!(owners <= 1 + by_word, "{owners} owners, {by_word} of them by their caller's word");
        assert!(!(self.source_runs && (self.ever_committed || self.deposed)), "the source runs what it does not own");
        assert!(
            !self.freed || self.destinations.iter().any(|d| d.state() == DestinationState::Complete),
            "freed before it was acknowledged"
        );
        for (runs, destination) in self.destination_runs.iter().zip(&self.destinations) {
            let owner =
                matches!(destination.state(), DestinationState::Owner | DestinationState::Complete | DestinationState::TookOver);
            assert_eq!(*runs, owner, "who runs is not who owns");
        }
    }

    /// All worlds one step from here.
    fn steps(&self) -> Vec<World> {
        let mut next = Vec::new();
        let mut step = |change: &dyn Fn(&mut World)| {
            let mut world = self.clone();
            change(&mut world);
            next.push(world);
        };
        for (at, item) in self.wire.iter().enumerate() {
            step(&|world| {
                world.wire.remove(at);
                world.deliver(*item)
            });
            if self.faults_left > 0 {
                // Repeated: delivered and still on the way.
                step(&|world| {
                    world.faults_left -= 1;
                    world.deliver(*item)
                });
                step(&|world| {
                    world.faults_left -= 1;
                    world.wire.remove(at);
                });
            }
        }
        if let SourceState::Copying(turn) = self.source.state()
            && let Some(d) = (0..self.destinations.len()).find(|d| session(*d) == turn.session)
        {
            step(&|world| world.at_source(d, SourceEvent::Copied(turn)));
        }
        for d in 0..self.destinations.len() {
            let holds_a_point = self.standby && self.source.standbys.contains(&session(d));
            if holds_a_point
                && matches!(
                    self.destinations[d].state(),
                    DestinationState::Asked | DestinationState::Mapped | DestinationState::Ready | DestinationState::Failed
                )
            {
                step(&|world| world.at_destination(d, DestinationEvent::TakeOver));
            }
            if self.destinations[d].state() == DestinationState::Owner {
                step(&|world| world.at_destination(d, DestinationEvent::AllHere));
            }
            if self.faults_left > 0 {
                let fault = |world: &mut World| world.faults_left -= 1;
                // Each end notices the end of a stream, or a deadline, when it likes; messages may survive it.
                if let Some(failure) = self.source_failure(d) {
                    step(&|world| {
                        fault(world);
                        world.at_source(d, failure)
                    });
                }
                step(&|world| {
                    fault(world);
                    world.at_destination(d, DestinationEvent::Lost)
                });
                step(&|world| {
                    fault(world);
                    world.at_destination(d, DestinationEvent::TimedOut)
                });
            }
        }
        next
    }
}

/// Visits every reachable world; returns how many.
fn explore(start: World, mut at_rest: impl FnMut(&World)) -> usize {
    let mut seen = HashSet::from([start.clone()]);
    let mut queue = VecDeque::from([start]);
    while let Some(world) = queue.pop_front() {
        world.check();
        let steps = world.steps();
        if world.wire.is_empty() {
            at_rest(&world);
        }
        for step in steps {
            if seen.insert(step.clone()) {
                queue.push_back(step);
            }
        }
    }
    seen.len()
}

#[test]
fn without_faults_the_program_moves_and_is_released() {
    let mut ends = 0;
    explore(World::new(1, 0), |world| {
        if world.destinations[0].state() == DestinationState::Complete {
            ends += 1;
            assert!(world.freed && world.ever_committed && world.destination_runs[0]);
        }
    });
    assert_eq!(ends, 1);
}

#[test]
fn any_three_faults_leave_at_most_one_owner() {
    let worlds = explore(World::new(1, 3), |_| {});
    assert!(worlds > 500, "only {worlds} worlds: the exploration is broken");
}

#[test]
fn two_destinations_and_two_faults_leave_at_most_one_owner() {
    let worlds = explore(World::new(2, 2), |_| {});
    assert!(worlds > 2_000, "only {worlds} worlds: the exploration is broken");
}

#[test]
fn a_failure_at_the_source_before_the_commit_always_resumes_it() {
    // In every world in which the source has not committed, the failure that its deadlines bring in the end lets the program run.
    explore(World::new(2, 2), |world| {
        let mut world = world.clone();
        for d in 0..2 {
            if let Some(failure) = world.source_failure(d) {
                world.at_source(d, failure);
            }
        }
        assert!(world.ever_committed || world.source_runs);
    });
}

#[test]
fn after_the_commit_only_its_session_is_answered_and_no_failure_undoes_it() {
    let (first, second) = (Turn { session: 1, epoch: 8 }, Turn { session: 2, epoch: 9 });
    let mut source = SourceHandover::new(7);
    assert_eq!(source.on(SourceEvent::Take(1)), SourceAction::SendOffer(first));
    assert_eq!(source.on(SourceEvent::Mapped(first)), SourceAction::Copy(first));
    assert_eq!(source.on(SourceEvent::Copied(first)), SourceAction::PauseAndPrepare(first));
    assert_eq!(source.on(SourceEvent::Ready(first)), SourceAction::StopAndCommit(first));
    assert_eq!(source.on(SourceEvent::Failed(first)), SourceAction::Ignore);
    assert_eq!(source.on(SourceEvent::Take(1)), SourceAction::CommitAgain(first));
    assert_eq!(source.on(SourceEvent::Take(2)), SourceAction::Refuse);
    assert_eq!(source.on(SourceEvent::Complete(second)), SourceAction::Refuse);
    assert_eq!(source.on(SourceEvent::Complete(first)), SourceAction::Release(first));
    assert_eq!(source.on(SourceEvent::Complete(first)), SourceAction::ReleasedAgain(first));
}

#[test]
fn a_ready_of_an_attempt_that_was_given_up_does_not_commit_the_next() {
    let mut source = SourceHandover::new(1);
    let first = Turn { session: 1, epoch: 2 };
    source.on(SourceEvent::Take(1));
    source.on(SourceEvent::Mapped(first));
    source.on(SourceEvent::Copied(first));
    assert_eq!(source.on(SourceEvent::Failed(first)), SourceAction::Resume);
    let second = Turn { session: 1, epoch: 3 };
    assert_eq!(source.on(SourceEvent::Take(1)), SourceAction::SendOffer(second));
    assert_eq!(source.on(SourceEvent::Mapped(second)), SourceAction::Copy(second));
    assert_eq!(source.on(SourceEvent::Copied(second)), SourceAction::PauseAndPrepare(second));
    assert_eq!(source.on(SourceEvent::Ready(first)), SourceAction::Refuse);
    assert_eq!(source.state(), SourceState::Paused(second));
}

#[test]
fn a_destination_whose_stream_breaks_goes_on_in_the_next_attempt() {
    for broken_after in ["OFFER", "MAPPED", "PREPARE", "READY"] {
        let (mut source, mut destination) = (SourceHandover::new(1), DestinationHandover::new());
        let first = Turn { session: 1, epoch: 2 };
        assert_eq!(source.on(SourceEvent::Take(1)), SourceAction::SendOffer(first));
        assert_eq!(destination.on(DestinationEvent::Offer { epoch: 2 }), DestinationAction::MapAndSayMapped);
        if broken_after != "OFFER" {
            source.on(SourceEvent::Mapped(first));
        }
        if matches!(broken_after, "PREPARE" | "READY") {
            source.on(SourceEvent::Copied(first));
        }
        if broken_after == "READY" {
            assert_eq!(destination.on(DestinationEvent::Prepared { epoch: 2 }), DestinationAction::SendReady);
        }
        assert_eq!(destination.on(DestinationEvent::Lost), DestinationAction::AskAgain, "{broken_after}");
        // The source may not have noticed.
        let second = Turn { session: 1, epoch: 3 };
        let offered = [SourceAction::SendOffer(second), SourceAction::ResumeAndOffer(second)];
        assert!(offered.contains(&source.on(SourceEvent::Take(1))), "{broken_after}");
        assert_eq!(source.on(SourceEvent::Ready(first)), SourceAction::Refuse);
        assert_eq!(destination.on(DestinationEvent::Prepared { epoch: 2 }), DestinationAction::Ignore);
        assert_eq!(destination.on(DestinationEvent::Offer { epoch: 3 }), DestinationAction::MapAndSayMapped);
        assert_eq!(source.on(SourceEvent::Mapped(second)), SourceAction::Copy(second));
        assert_eq!(source.on(SourceEvent::Copied(second)), SourceAction::PauseAndPrepare(second));
        assert_eq!(destination.on(DestinationEvent::Prepared { epoch: 3 }), DestinationAction::SendReady);
        assert_eq!(source.on(SourceEvent::Ready(second)), SourceAction::StopAndCommit(second));
        assert_eq!(destination.on(DestinationEvent::Commit { epoch: 3 }), DestinationAction::Run);
    }
}

#[test]
fn a_source_that_was_told_of_a_takeover_never_runs_nor_commits_again() {
    let worlds = explore(World::of_standbys(1, 3), |_| {});
    assert!(worlds > 1_000, "only {worlds} worlds: the exploration is broken");
    let worlds = explore(World::of_standbys(2, 1), |_| {});
    assert!(worlds > 2_000, "only {worlds} worlds: the exploration is broken");
}

#[test]
fn wherever_a_source_is_the_word_of_its_standby_ends_it() {
    let mut told = 0;
    explore(World::of_standbys(1, 2), |world| {
        if world.took_over[0] && !world.deposed {
            let (mut world, epoch) = (world.clone(), world.destinations[0].epoch());
            // It asks until it is heard.
            world.deliver((0, true, Message::Depose, epoch, 0));
            world.check();
            assert!(world.deposed, "{:?} was not ended", world.source.state());
            world.deliver((0, true, Message::Depose, epoch, 0));
            told += 1;
        }
    });
    assert!(told > 10, "only {told} worlds");
}

#[test]
fn only_a_session_that_stood_by_takes_over_and_only_by_a_higher_epoch() {
    let mut source = SourceHandover::new(1);
    let (turn, by) = (Turn { session: 1, epoch: 2 }, Turn { session: 1, epoch: raised(2) });
    source.on(SourceEvent::Take(1));
    source.on(SourceEvent::Mapped(turn));
    assert_eq!(source.on(SourceEvent::Depose(by)), SourceAction::Refuse, "it is an ordinary destination");
    source.on(SourceEvent::StandsBy(turn));
    assert_eq!(source.on(SourceEvent::Depose(Turn { session: 2, ..by })), SourceAction::Refuse);
    assert_eq!(source.on(SourceEvent::Depose(turn)), SourceAction::Refuse, "it is the source's own number");
    // Its session may be over, and others have asked since.
    source.on(SourceEvent::Failed(turn));
    source.on(SourceEvent::Take(7));
    assert_eq!(source.on(SourceEvent::Depose(by)), SourceAction::StopAndSayDeposed(by));
    assert_eq!(source.on(SourceEvent::Depose(by)), SourceAction::StopAndSayDeposed(by));
    for late in [SourceEvent::Take(1), SourceEvent::Take(7), SourceEvent::Ready(turn), SourceEvent::Mapped(turn)] {
        assert_eq!(source.on(late), SourceAction::Refuse);
    }
    assert_eq!(source.on(SourceEvent::Failed(Turn { session: 7, epoch: 3 })), SourceAction::Ignore);
    assert_eq!(source.state(), SourceState::Deposed(by));
}

#[test]
fn what_was_committed_to_another_is_not_taken_over() {
    let mut source = SourceHandover::new(1);
    let turn = Turn { session: 1, epoch: 2 };
    source.on(SourceEvent::Take(1));
    source.on(SourceEvent::Mapped(turn));
    source.on(SourceEvent::StandsBy(turn));
    source.on(SourceEvent::Failed(turn));
    let other = Turn { session: 7, epoch: 3 };
    source.on(SourceEvent::Take(7));
    source.on(SourceEvent::Mapped(other));
    source.on(SourceEvent::Copied(other));
    assert_eq!(source.on(SourceEvent::Ready(other)), SourceAction::StopAndCommit(other));
    assert_eq!(source.on(SourceEvent::Depose(Turn { session: 1, epoch: raised(2) })), SourceAction::Refuse);
    assert_eq!(source.state(), SourceState::Committed(other));
}
