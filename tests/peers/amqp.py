"""An AMQP client as a partner would write one, with pika, told what to do line by line.

    amqp.py amqp://user:password@host:port/vhost

Reads one JSON object a line, `{"call": name, "args": {…}}`, and answers each with one line: `{"ok": result}`, or
`{"error": {"code", "text", "of"}}` where `of` is what broke: `channel`, `connection`, or `message` (returned or
refused). A call is a method of pika's BlockingChannel, or one of this file's `do_…`. A channel that RabbitMQ closed is
opened again for the next call. Bodies are base64.
"""

import base64
import json
import sys

import pika
from pika import exceptions

PROPERTIES = pika.BasicProperties


class Peer:
    def __init__(self, url):
        parameters = pika.URLParameters(url)
        parameters.connection_attempts = 1
        parameters.socket_timeout = 20
        parameters.blocked_connection_timeout = 20
        self.connection = pika.BlockingConnection(parameters)
        self.channel = None

    def open_channel(self):
        if self.channel is None or not self.channel.is_open:
            self.channel = self.connection.channel()
            self.channel.confirm_delivery()
        return self.channel

    def do_publish(self, messages, mandatory=True):
        """Publishes messages one after the other, each confirmed before the next."""
        for message in messages:
            self.open_channel().basic_publish(
                message["exchange"],
                message["key"],
                base64.b64decode(message["body"]),
                PROPERTIES(**message.get("properties", {})),
                mandatory=mandatory,
            )
        return len(messages)

    def do_receive(self, queue, count, ack=True, exclusive=False, wait_s=20):
        """Consumes until `count` have come, or nothing has for a while; a message is acknowledged as it comes."""
        channel = self.open_channel()
        came = []
        consumer = channel.consume(queue, exclusive=exclusive, inactivity_timeout=wait_s)
        for method, properties, body in consumer:
            if method is None:
                break
            came.append(described(method, properties, body))
            if ack:
                channel.basic_ack(method.delivery_tag)
            if len(came) == count:
                break
        channel.cancel()
        return came

    def do_get(self, queue):
        """The front of a queue, taken; None when it is empty."""
        method, properties, body = self.open_channel().basic_get(queue, auto_ack=True)
        return None if method is None else described(method, properties, body)

    def do_hold(self, queue, count, exclusive=False):
        """Has `count` messages handed to a consumer that stays, and leaves them unacknowledged."""
        channel = self.open_channel()
        self.held = []
        channel.basic_qos(prefetch_count=max(count, 1))
        channel.basic_consume(queue, lambda _, *message: self.held.append(described(*message)), exclusive=exclusive)
        while len(self.held) < count:
            self.connection.process_data_events(time_limit=1)
        return self.held

    def do_alive(self):
        """Whether the connection still is: asks RabbitMQ something."""
        self.connection.process_data_events(time_limit=0)
        self.connection.channel().close()
        return True

    def call(self, name, args):
        own = getattr(self, "do_" + name, None)
        if own is not None:
            return own(**args)
        frame = getattr(self.open_channel(), name)(**args)
        method = getattr(frame, "method", None)
        return {key: value for key, value in vars(method).items() if plain(value)} if method is not None else None


def plain(value):
    return isinstance(value, (str, int, bool, type(None)))


def described(method, properties, body):
    known = {name: value for name, value in vars(properties).items() if value is not None}
    known["headers"] = {name: value for name, value in (properties.headers or {}).items() if plain(value)}
    return {
        "exchange": method.exchange,
        "key": method.routing_key,
        "redelivered": method.redelivered,
        "properties": known,
        "body": base64.b64encode(body).decode(),
    }


def failure(error):
    if isinstance(error, exceptions.ChannelClosedByBroker):
        return {"of": "channel", "code": error.reply_code, "text": error.reply_text}
    if isinstance(error, exceptions.ConnectionClosedByBroker):
        return {"of": "connection", "code": error.reply_code, "text": error.reply_text}
    if isinstance(error, (exceptions.UnroutableError, exceptions.NackError)):
        return {"of": "message", "code": 0, "text": type(error).__name__}
    if isinstance(error, exceptions.AMQPError):
        return {"of": "connection", "code": 0, "text": f"{type(error).__name__}: {error}"}
    raise error


def main():
    peer = None
    try:
        peer = Peer(sys.argv[1])
        answer = {"ok": "connected"}
    except (exceptions.AMQPError, OSError) as error:
        answer = {"error": {"of": "connection", "code": 0, "text": f"{type(error).__name__}: {error}"}}
    print(json.dumps(answer), flush=True)
    if peer is None:
        return
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = {"ok": peer.call(order["call"], order["args"])}
        except exceptions.AMQPError as error:
            answer = {"error": failure(error)}
        print(json.dumps(answer), flush=True)


main()
