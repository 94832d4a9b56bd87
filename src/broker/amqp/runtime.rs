//! The thread on which AMQP work runs, but for what each message goes through ([`AmqpThread::carry`]).
//!
//! lapin wants a tokio runtime with I/O for as long as a connection lives. Callers sit on actix arbiters, which come
//! and go with their system, so the broker has a small runtime of its own: one thread, no work stealing. Each lapin
//! connection adds a thread that does its reading, parsing and writing.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

use crate::broker::{BrokerError, BrokerErrorKind};

/// How long the thread waits at its end for what is still running on it.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);

/// See the module. Stops when it is dropped.
#[derive(Debug)]
pub(super) struct AmqpThread {
    handle: Handle,
    stop: Mutex<Option<oneshot::Sender<()>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl AmqpThread {
    /// Starts it.
    pub(super) fn start() -> Result<Self, BrokerError> {
        let action = "start the AMQP thread";
        let fail = |error: std::io::Error| BrokerError::new(BrokerErrorKind::Internal, action).caused_by(error);
        let runtime = Builder::new_current_thread().enable_all().build().map_err(fail)?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let body = move || {
            // Both ends of it: told to stop, or forgotten.
            let _ = runtime.block_on(stopped);
            runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
        };
        let thread = std::thread::Builder::new().name("amqp".into()).spawn(body).map_err(fail)?;
        Ok(Self { handle, stop: Mutex::new(Some(stop)), thread: Mutex::new(Some(thread)) })
    }

    /// For tasks that start others.
    pub(super) fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Runs a task on it, to the end, whoever still waits for it.
    pub(super) fn spawn<F>(&self, task: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.handle.spawn(task)
    }

    /// Runs `task` on it and waits for its result. Dropping the future does not stop the task.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        action: &str,
        task: impl Future<Output = Result<T, BrokerError>> + Send + 'static,
    ) -> Result<T, BrokerError> {
        match self.handle.spawn(task).await {
            Ok(result) => result,
            Err(error) if error.is_cancelled() => Err(BrokerError::new(BrokerErrorKind::Closed, action)),
            Err(error) => Err(BrokerError::new(BrokerErrorKind::Internal, action).caused_by(error)),
        }
    }

    /// Runs `task` where it is called, for what each message goes through: every thread between costs it time. When the
    /// future is dropped, the thread carries on with the task; so it must not be in the middle of a timer or socket of the
    /// runtime that it began on, which may be gone by then: such parts go through [`AmqpThread::run`].
    pub(super) fn carry<F>(&self, task: F) -> impl Future<Output = F::Output> + Send + use<F>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        Carried { task: Some(Box::pin(task)), handle: self.handle.clone() }
    }

    /// Ends it; what still runs on it is dropped. Later tasks are not run.
    pub(super) fn stop(&self) {
        self.stop.lock().take();
        if let Some(thread) = self.thread.lock().take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            log::error!("the AMQP thread panicked");
        }
    }
}

impl Drop for AmqpThread {
    fn drop(&mut self) {
        // Not joined: the last owner may be a task on this very thread.
        self.stop.lock().take();
    }
}

/// See [`AmqpThread::carry`].
struct Carried<F: Future<Output: Send> + Send + 'static> {
    /// Until it has ended.
    task: Option<Pin<Box<F>>>,
    handle: Handle,
}

impl<F: Future<Output: Send> + Send + 'static> Future for Carried<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        // Not put back when it panics.
        let mut task = self.task.take().expect("a future is not polled after its end");
        let polled = task.as_mut().poll(context);
        if polled.is_pending() {
            self.task = Some(task);
        }
        polled
    }
}

impl<F: Future<Output: Send> + Send + 'static> Drop for Carried<F> {
    fn drop(&mut self) {
        if let Some(task) = self.task.take() {
            self.handle.spawn(task);
        }
    }
}
