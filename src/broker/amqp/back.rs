//! What goes back to RabbitMQ: how often it was handed out is noted first, and each queue gets its own back in order.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::oneshot;

use super::Shared;
use super::channel::IntakeChannel;
use super::consumer::{Pending, Rest};
use super::held::Held;
use super::intake::{First, GivenBack, Left, Note, Subscription};
use super::returned::BackTo;
use crate::broker::Queue;

impl Shared {
    /// Ends a subscription. What nobody was handed goes back: what is in its buffer, and then what nobody looked at.
    /// `outstanding` are not settled, the buffer included.
    pub(super) fn end_subscription(
        self: &Arc<Self>,
        queue: &Queue,
        subscription: Subscription,
        buffer: impl IntoIterator<Item = Held>,
        outstanding: usize,
        ended: Option<oneshot::Sender<()>>,
    ) {
        let channel = Arc::clone(&subscription.channel);
        let first = self.first_on(&channel, buffer);
        let note = self.note_of(queue);
        let left = Left::Back { to: self.back_to(queue), first, outstanding, note, ended };
        self.intake(queue).end(&self.thread, subscription, left);
    }

    /// What a consumer leaves that goes while its subscription is being made anew goes back: its buffer, then what the
    /// subscription before had on its way, then what the next one has been handed.
    pub(super) fn give_back_in_turn(
        self: &Arc<Self>,
        queue: &Queue,
        buffer: VecDeque<Held>,
        rest: Option<Rest>,
        pending: Option<Pending>,
    ) {
        let last = buffer.back().map(|held| Arc::clone(&held.channel));
        let (channel, rest) = rest.unzip();
        let first = channel.or(last).map(|channel| {
            let first = self.first_on(&channel, buffer);
            (channel, first)
        });
        if first.is_none() && pending.is_none() {
            return;
        }
        let (note, to) = (self.note_of(queue), self.back_to(queue));
        let back = GivenBack { queue: queue.to_string(), first, rest, pending, note, to };
        self.intake(queue).give_back(&self.thread, back);
    }

    fn back_to(&self, queue: &Queue) -> BackTo {
        let is_internal = matches!(queue, Queue::Publish | Queue::Unrouted);
        if !is_internal && self.clients.owner(queue).is_none_or(|client| client.is_gone()) {
            BackTo::Nowhere
        } else {
            self.options.queue_type.into()
        }
    }

    /// Notes that these go back, and returns those that came on `channel`; others go back at once.
    fn first_on(&self, channel: &Arc<IntakeChannel>, buffer: impl IntoIterator<Item = Held>) -> First {
        let mut first = First::default();
        for held in buffer {
            // What came on an earlier channel went back with that.
            if Arc::ptr_eq(&held.channel, channel) {
                self.memory.note(held.key, held.before);
                first.tags.push(held.tag);
                first.came_back = held.came_back;
            } else {
                self.give_back(&held);
            }
        }
        first
    }

    /// Notes that deliveries go back that nobody has looked at.
    pub(super) fn note_of(self: &Arc<Self>, queue: &Queue) -> Note {
        let (shared, name, of) = (Arc::clone(self), queue.to_string(), queue.clone());
        Box::new(move |left| {
            for delivery in left {
                shared.memory.note_unseen(delivery, &name, shared.trusted(&of));
            }
        })
    }

    /// Gives back one that nobody was handed.
    pub(super) fn give_back(&self, held: &Held) {
        self.memory.note(held.key, held.before);
        held.channel.give_back([held.tag]);
    }
}
