//! The two hosts, as their parent holds them.
//!
//! Role: starts the processes, gives orders, hears them, and sees to it that they end. Neighbours: `run` gives the orders; `host` is the other side of the pipes; `journal` gets what is
//! acknowledged. Invariants: a host never outlives its parent: dropped, it is killed, and if the parent is killed, the end of its standard input tells it; no wait is without a
//! limit; the death of either host ends every wait.

use crate::{
    journal::Journal,
    link::Link,
    messages::{Message, MessageError, Order},
};
use std::{
    collections::VecDeque,
    env,
    io::{self, BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};
use thiserror::Error;

/// The subcommand that makes this program a host.
pub const HOST: &str = "host";
/// Of the hosts, in the order of their numbers.
pub const NAMES: [&str; 2] = ["A", "B"];

/// A host is of no more use.
#[derive(Debug, Error)]
pub enum ProcessError {
    #[error("a host's process could not be started: {0}")]
    Start(io::Error),
    #[error("host {}, process {pid}, died: {status}", NAMES[*host])]
    Died { host: usize, pid: u32, status: ExitStatus },
    #[error("host {}, process {pid}, gave up: {why}", NAMES[*host])]
    GaveUp { host: usize, pid: u32, why: String },
    #[error("host {}, process {pid}, did not answer within {limit:?}; a slower machine needs a smaller --size", NAMES[*host])]
    Silent { host: usize, pid: u32, limit: Duration },
    #[error("host {} cannot be talked to: {source}", NAMES[*host])]
    Pipe { host: usize, source: io::Error },
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("host {} spoke out of turn: {said:?}", NAMES[*host])]
    OutOfTurn { host: usize, said: Box<Message> },
}

struct Host {
    child: Child,
    input: ChildStdin,
    /// What it said before it was asked about.
    said: VecDeque<Message>,
}

impl Drop for Host {
    fn drop(&mut self) {
        // Ended already after a run that went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a host's stream brought: `None` at its end.
type Heard = (usize, Option<Result<Message, MessageError>>);

/// Both hosts.
pub struct Hosts {
    hosts: [Host; 2],
    heard: Receiver<Heard>,
    journal: Arc<Mutex<Journal>>,
}

impl Hosts {
    /// Starts this program twice more, at the two ends of this link.
    ///
    /// # Errors
    /// [`ProcessError::Start`].
    pub fn start(link: &Link) -> Result<Hosts, ProcessError> {
        let (hears, heard) = channel();
        let journal = Arc::default();
        let start = |host| start(host, link, &journal, hears.clone()).map_err(ProcessError::Start);
        Ok(Hosts { hosts: [start(0)?, start(1)?], heard, journal })
    }

    pub fn pid(&self, host: usize) -> u32 {
        self.hosts[host].child.id()
    }

    /// What was acknowledged so far.
    pub fn journal(&self) -> MutexGuard<'_, Journal> {
        lock(&self.journal)
    }

    /// # Errors
    /// [`ProcessError`].
    pub fn order(&mut self, host: usize, order: &Order) -> Result<(), ProcessError> {
        let sent = writeln!(self.hosts[host].input, "{}", order.to_line());
        sent.map_err(|source| match source.kind() {
            io::ErrorKind::BrokenPipe => self.ended(host),
            _ => ProcessError::Pipe { host, source },
        })
    }

    /// The next thing that `host` says, if it is what `expected` takes.
    ///
    /// # Errors
    /// [`ProcessError`], also when the other host fails meanwhile.
    pub fn hear<T>(
        &mut self,
        host: usize,
        limit: Duration,
        expected: impl Fn(Message) -> Result<T, Message>,
    ) -> Result<T, ProcessError> {
        let end = Instant::now() + limit;
        loop {
            if let Some(message) = self.hosts[host].said.pop_front() {
                return expected(message).map_err(|said| ProcessError::OutOfTurn { host, said: Box::new(said) });
            }
            self.listen(end)?.ok_or_else(|| ProcessError::Silent { host, pid: self.pid(host), limit })?;
        }
    }

    /// Lets this much time pass while the program runs.
    ///
    /// # Errors
    /// [`ProcessError`] if a host fails meanwhile.
    pub fn let_run(&mut self, time: Duration) -> Result<(), ProcessError> {
        let end = Instant::now() + time;
        while self.listen(end)?.is_some() {}
        Ok(())
    }

    /// Takes in one message of any host; `None` when there was none until `end`.
    fn listen(&mut self, end: Instant) -> Result<Option<()>, ProcessError> {
        let (host, heard) = match self.heard.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(heard) => heard,
            // Both have ended, which was told before.
            Err(RecvTimeoutError::Disconnected) => return Err(self.ended(0)),
            Err(RecvTimeoutError::Timeout) => return Ok(None),
        };
        match heard {
            None => Err(self.ended(host)),
            Some(Err(error)) => Err(error.into()),
            Some(Ok(Message::Failed(why))) => Err(ProcessError::GaveUp { host, pid: self.pid(host), why }),
            Some(Ok(message)) => {
                self.hosts[host].said.push_back(message);
                Ok(Some(()))
            }
        }
    }

    /// It has closed its streams, so it has ended or is about to.
    fn ended(&mut self, host: usize) -> ProcessError {
        let pid = self.pid(host);
        match self.hosts[host].child.wait() {
            Ok(status) => ProcessError::Died { host, pid, status },
            Err(source) => ProcessError::Pipe { host, source },
        }
    }
}

fn start(host: usize, link: &Link, journal: &Arc<Mutex<Journal>>, hears: Sender<Heard>) -> io::Result<Host> {
    let mut command = Command::new(env::current_exe()?);
    // In this process's group: Ctrl-C ends all three.
    let mut child = command.arg(HOST).args(link.arguments()).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(io::Error::other("its standard streams are no pipes"));
    };
    let journal = journal.clone();
    thread::spawn(move || {
        read(host, output, &journal, &hears);
        let _ = hears.send((host, None));
    });
    Ok(Host { child, input, said: VecDeque::new() })
}

/// Writes acknowledgements into the journal, and hands everything else on.
fn read(host: usize, output: ChildStdout, journal: &Mutex<Journal>, hears: &Sender<Heard>) {
    for line in BufReader::new(output).lines().map_while(Result::ok) {
        if let Ok(number) = line.parse() {
            lock(journal).committed(host, number, Instant::now());
            continue;
        }
        let message = Message::from_line(&line);
        if let Ok(Message::Departed(_)) = message {
            lock(journal).left(host);
        }
        if hears.send((host, Some(message))).is_err() {
            return;
        }
    }
}

fn lock(journal: &Mutex<Journal>) -> MutexGuard<'_, Journal> {
    journal.lock().unwrap_or_else(PoisonError::into_inner)
}
