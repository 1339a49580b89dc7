//! The other of two ends, always a process of its own.
//!
//! Role: starts this binary again in a role and talks with it in lines of JSON over its standard input and output: set-up only, what is
//! measured goes by its own way. Neighbours: `udp` and `server` are roles. Invariants: a far end ends when its bench does, however that
//! ends, for its input is closed then; its bench waits for it.

use super::Result;
use serde_json::{Value, json};
use std::{
    io::{BufRead, BufReader, Write, stdin, stdout},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

/// A process in a role.
pub struct FarEnd {
    role: &'static str,
    child: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
}

impl FarEnd {
    pub fn start(role: &'static str) -> Result<FarEnd> {
        let mut command = Command::new(std::env::current_exe()?);
        let mut child = command.args(["--role", role]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (to, from) = (child.stdin.take(), child.stdout.take().ok_or("the far end has no standard output")?);
        Ok(FarEnd { role, child, to, from: BufReader::new(from) })
    }

    /// Asks and waits for the answer.
    pub fn ask(&mut self, question: &Value) -> Result<Value> {
        let to = self.to.as_mut().ok_or("the far end has no standard input")?;
        writeln!(to, "{question}").map_err(|error| format!("the far end '{}' is gone: {error}", self.role))?;
        let mut line = String::new();
        if self.from.read_line(&mut line)? == 0 {
            return Err(
                format!("the far end '{}' ended ({:?}) without an answer to {question}", self.role, self.child.try_wait()).into()
            );
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// CPU seconds of that process so far.
    pub fn cpu_s(&mut self) -> Result<f64> {
        field(&self.ask(&json!({ "ask": "cpu" }))?, "cpu_s", Value::as_f64)
    }
}

impl Drop for FarEnd {
    fn drop(&mut self) {
        drop(self.to.take());
        // Nothing can be done about a child that cannot be waited for.
        let _ = self.child.wait();
    }
}

/// A far end's life: answers until the bench closes the pipe.
pub fn answer(mut to: impl FnMut(&str, &Value) -> Result<Value>) -> Result<()> {
    for line in stdin().lock().lines() {
        let question: Value = serde_json::from_str(&line?)?;
        let ask = field(&question, "ask", Value::as_str)?;
        let answer = if ask == "cpu" { json!({ "cpu_s": super::raw::cpu_s() }) } else { to(ask, &question)? };
        let mut out = stdout().lock();
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}

/// A field of a message: `field(&answer, "port", Value::as_u64)`.
pub fn field<'a, T>(message: &'a Value, name: &str, read: impl FnOnce(&'a Value) -> Option<T>) -> Result<T> {
    message.get(name).and_then(read).ok_or_else(|| format!("'{name}' is missing or wrong in {message}").into())
}
