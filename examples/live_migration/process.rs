//! The other process, as the source holds it.
//!
//! Role: starts process B, listens to it, and sees to it that it ends. Neighbours: `source` holds one; `destination` is the other side
//! of its pipes. Invariants: it never outlives its source: dropped, it is killed, and if the source itself is killed, the end of its
//! standard input tells it; no wait for it is without a limit.

use crate::{
    link::Link,
    messages::{Message, MessageError, Order},
};
use pageferry::PeerId;
use std::{
    env, io,
    process::{ExitStatus, Stdio},
    time::Duration,
};
use thiserror::Error;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::timeout,
};

/// The subcommand that makes this program a destination.
pub const DESTINATION: &str = "destination";
/// The destination says something ten times a second.
const SILENCE_LIMIT: Duration = Duration::from_secs(20);
/// Long enough to unmap a gigabyte.
const EXIT_LIMIT: Duration = Duration::from_secs(5);

/// The destination is of no more use.
#[derive(Debug, Error)]
pub enum ProcessError {
    #[error("the destination's process could not be started: {0}")]
    Start(io::Error),
    #[error("the destination, process {pid}, died: {status}")]
    Died { pid: u32, status: ExitStatus },
    #[error("the destination, process {pid}, gave up: {why}")]
    GaveUp { pid: u32, why: String },
    #[error("the destination, process {pid}, said nothing for {SILENCE_LIMIT:?} and was killed")]
    Silent { pid: u32 },
    #[error("the destination, process {pid}, cannot be talked to: {source}")]
    Pipe { pid: u32, source: io::Error },
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("the destination spoke out of turn: {0:?}")]
    OutOfTurn(Box<Message>),
}

/// Process B.
pub struct Process {
    child: Child,
    pid: u32,
    input: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Process {
    /// Starts this program again as a destination, at the other end of this link.
    ///
    /// # Errors
    /// [`ProcessError::Start`].
    pub fn start(link: &Link) -> Result<Process, ProcessError> {
        let mut command = Command::new(env::current_exe().map_err(ProcessError::Start)?);
        command.arg(DESTINATION).args(link.arguments()).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        // A group of its own: Ctrl-C goes to the source alone, which then ends both.
        command.process_group(0);
        let mut child = command.spawn().map_err(ProcessError::Start)?;
        let (Some(pid), Some(input), Some(output)) = (child.id(), child.stdin.take(), child.stdout.take()) else {
            return Err(ProcessError::Start(io::Error::other("its standard streams are no pipes")));
        };
        Ok(Process { child, pid, input, lines: BufReader::new(output).lines() })
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Learns the name of its key, the first thing it says. The key itself never leaves it.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub async fn peer_id(&mut self) -> Result<PeerId, ProcessError> {
        match self.next().await? {
            Message::Hello(id) => Ok(id),
            other => Err(ProcessError::OutOfTurn(Box::new(other))),
        }
    }

    /// Has it take the program.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub async fn order(&mut self, order: &Order) -> Result<(), ProcessError> {
        match self.input.write_all(format!("{}\n", order.to_line()).as_bytes()).await {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(self.ends().await),
            Err(source) => Err(ProcessError::Pipe { pid: self.pid, source }),
        }
    }

    /// The next thing it says: a status or the outcome.
    ///
    /// Cancellation: what was half read is lost.
    ///
    /// # Errors
    /// [`ProcessError`], also when it says nothing for 20 s.
    pub async fn next(&mut self) -> Result<Message, ProcessError> {
        let Ok(line) = timeout(SILENCE_LIMIT, self.lines.next_line()).await else {
            // It may be stopped, which SIGKILL ends all the same.
            let _ = self.child.kill().await;
            return Err(ProcessError::Silent { pid: self.pid });
        };
        match line.map_err(|source| ProcessError::Pipe { pid: self.pid, source })? {
            None => Err(self.ends().await),
            Some(line) => match Message::from_line(&line)? {
                Message::Failed(why) => Err(ProcessError::GaveUp { pid: self.pid, why }),
                message => Ok(message),
            },
        }
    }

    /// Returns when it dies. Cancellation: nothing changes.
    pub async fn death(&mut self) -> ProcessError {
        match self.child.wait().await {
            Ok(status) => ProcessError::Died { pid: self.pid, status },
            Err(source) => ProcessError::Pipe { pid: self.pid, source },
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// [`ProcessError::Died`] if it ends with an error, after all that it said.
    pub async fn end(mut self) -> Result<(), ProcessError> {
        match self.ends().await {
            ProcessError::Died { status, .. } if status.success() => Ok(()),
            error => Err(error),
        }
    }

    /// It has closed its streams, so it has ended, or will at once.
    async fn ends(&mut self) -> ProcessError {
        if timeout(EXIT_LIMIT, self.child.wait()).await.is_err() {
            let _ = self.child.start_kill();
        }
        self.death().await
    }
}
