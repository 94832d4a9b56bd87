//! Reading the front of deep queues back from disk.

use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension as _};

use super::core::Load;
use super::queue::{Body, BodyRef, Slot};
use super::{Shared, schema};

/// Entries in one page at most.
const PAGE_ENTRIES: usize = if cfg!(test) { 6 } else { 2048 };

/// Bytes of messages in one page, about.
const PAGE_BYTES: usize = if cfg!(test) { 8 << 10 } else { 2 << 20 };

/// What was read.
type Loaded = (Vec<Arc<Body>>, Vec<Slot>);

pub(super) fn start(shared: &Arc<Shared>, load: Load) {
    let (queue, job_shared) = (load.queue, Arc::clone(shared));
    let submitted = shared.db.submit_read(move |connection| match read(connection, &load) {
        Ok((bodies, page)) => job_shared.with_core(|core| core.loaded(&load, bodies, page)),
        Err(error) => {
            log::error!("read a page of queue {}: {error}", load.queue);
            job_shared.with_core(|core| core.load_failed(load.queue));
        }
    });
    if !submitted {
        shared.core.lock().load_failed(queue);
    }
}

fn read(connection: &Connection, load: &Load) -> rusqlite::Result<Loaded> {
    let mut bodies = Vec::with_capacity(load.bodies.len());
    let mut select = connection.prepare_cached(schema::BODY)?;
    for &id in &load.bodies {
        let body = select
            .query_row([id], |row| {
                let head: Vec<u8> = row.get(0)?;
                Ok(Body::loaded(id, schema::decode_payload(&head, row.get(1)?)?, row.get(2)?))
            })
            .optional()?;
        match body {
            Some(body) => bodies.push(Arc::new(body)),
            None => log::error!("body {id} of queue {} is missing on disk", load.queue),
        }
    }
    let page = load.page_after.map(|after| page(connection, load.queue, after)).transpose()?.unwrap_or_default();
    Ok((bodies, page))
}

fn page(connection: &Connection, queue: u32, after: u64) -> rusqlite::Result<Vec<Slot>> {
    let mut select = connection.prepare_cached(schema::PAGE)?;
    let mut rows = select.query((queue, after, PAGE_ENTRIES))?;
    let (mut page, mut bytes) = (Vec::new(), 0);
    while bytes < PAGE_BYTES
        && let Some(row) = rows.next()?
    {
        let head: Vec<u8> = row.get(5)?;
        let body = Body::loaded(row.get(1)?, schema::decode_payload(&head, row.get(6)?)?, row.get(7)?);
        let slot = Slot {
            pos: row.get(0)?,
            body: BodyRef::Hot(Arc::new(body)),
            at: row.get(2)?,
            deliveries: row.get(3)?,
            attempts: row.get(4)?,
            window: 0,
            index: 0,
            leased: None,
        };
        bytes += slot.size();
        page.push(slot);
    }
    Ok(page)
}
