"""Ordinary safe programs, near misses among them: what a careful programmer writes. No rule of ours may fire on them."""

BENIGN = {
    "escaped-page": """
from flask import Flask, request
from markupsafe import escape
app = Flask(__name__)
@app.route("/hello")
def hello():
    name = escape(request.args.get("name", "you"))
    page = "<h1>Hello " + name + "</h1>"
    return page
""",
    "templates": """
from flask import Flask, render_template, request
app = Flask(__name__)
@app.route("/contact", methods=["GET", "POST"])
def contact():
    if request.method == "POST":
        form = {key: request.form[key].strip() for key in ("name", "email")}
        return render_template("thanks.html", **form)
    return "<form method='post'><input name='name'></form>"
""",
    "json-api": """
from flask import Flask, jsonify, request
app = Flask(__name__)
notes = []
@app.post("/notes")
def add():
    notes.append(request.get_json())
    return jsonify(notes), 201
@app.get("/notes")
def show():
    return {"notes": notes}
""",
    "validated-choice": """
from flask import Flask, abort, request, send_file
app = Flask(__name__)
REPORTS = {"year": "reports/year.pdf", "month": "reports/month.pdf"}
@app.route("/report")
def report():
    kind = request.args["kind"]
    if kind not in REPORTS:
        abort(404)
    return send_file(REPORTS[kind])
""",
    "safe-upload": """
import os
from flask import Flask, request, send_from_directory
from werkzeug.utils import secure_filename
app = Flask(__name__)
@app.route("/upload", methods=["POST"])
def upload():
    file = request.files["file"]
    name = secure_filename(file.filename)
    file.save(os.path.join("uploads", name))
    return "stored"
@app.route("/files/<path:name>")
def fetch(name):
    return send_from_directory("uploads", name)
""",
    "contained-path": """
from pathlib import Path
from flask import Flask, abort, request
app = Flask(__name__)
ROOT = Path("notes").resolve()
@app.route("/note")
def note():
    path = (ROOT / request.args["name"]).resolve()
    if not path.is_relative_to(ROOT):
        abort(403)
    return {"text": path.read_text()}
""",
    "parameters": """
import sqlite3
from flask import Flask, jsonify, request
app = Flask(__name__)
@app.route("/users")
def users():
    with sqlite3.connect("app.db") as db:
        rows = db.execute("SELECT id, name FROM users WHERE name LIKE ?", (f"%{request.args['q']}%",))
        return jsonify([dict(zip(("id", "name"), row)) for row in rows])
""",
    "plain-text": """
from flask import Flask, Response, request
app = Flask(__name__)
@app.route("/echo")
def echo():
    return Response(request.args["text"], mimetype="text/plain")
""",
    "redirect-home": """
from flask import Flask, redirect, request, session, url_for
app = Flask(__name__)
@app.route("/login", methods=["POST"])
def login():
    user = find_user(request.form["user"])
    if user is None or not user.check(request.form["password"]):
        return redirect(url_for("login_form", wrong=1))
    session["user"] = user.id
    return redirect(url_for("home"))
""",
    "fastapi": """
from fastapi import FastAPI, HTTPException
app = FastAPI()
@app.get("/items/{item}")
async def read(item: str, q: str | None = None):
    if item not in ITEMS:
        raise HTTPException(404)
    return {"item": item, "note": f"<{q}>"}
@app.get("/greet")
async def greet(name: str):
    return f"hello {name}"
""",
    "django": """
from django.shortcuts import get_object_or_404, render
def detail(request, pk):
    item = get_object_or_404(Item, pk=pk)
    return render(request, "detail.html", {"item": item, "query": request.GET.get("q", "")})
""",
    "aiohttp": """
from aiohttp import web
async def handle(request):
    name = request.match_info.get("name", "you")
    return web.json_response({"hello": name})
app = web.Application()
app.router.add_get("/{name}", handle)
""",
    "file-server": """
import functools
from http.server import HTTPServer, SimpleHTTPRequestHandler
handler = functools.partial(SimpleHTTPRequestHandler, directory="public")
HTTPServer(("127.0.0.1", 8000), handler).serve_forever()
""",
    "command-line": """
import argparse
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("path", type=Path)
args = parser.parse_args()
for line in args.path.read_text().splitlines():
    print(line.upper())
""",
    "asks-the-user": """
name = input("File: ")
with open(name) as file:
    print(sum(len(line.split()) for line in file))
""",
    "html-report": """
def table(rows):
    cells = "".join(f"<tr><td>{row['name']}</td><td>{row['total']:.2f}</td></tr>" for row in rows)
    return f"<table>{cells}</table>"
""",
    "permissions": """
import os, stat
from pathlib import Path
def protect(path):
    Path(path).parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    os.chmod(path, stat.S_IRUSR | stat.S_IWUSR)
    os.makedirs("build", exist_ok=True)
""",
    "archives": """
import tarfile, zipfile
def unpack(path, target):
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(target)
    else:
        with tarfile.open(path) as archive:
            archive.extractall(target, filter="data")
def pack(path, source):
    with tarfile.open(path, "w:gz") as archive:
        archive.add(source)
""",
    "checked-members": """
import os, tarfile
def unpack(path, target):
    root = os.path.realpath(target)
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            if not os.path.realpath(os.path.join(root, member.name)).startswith(root + os.sep):
                raise ValueError(member.name)
            archive.extract(member, root)
""",
    "secrets": """
import hashlib, os, secrets
def new_token():
    return secrets.token_hex(16)
def store(password):
    salt = os.urandom(16)
    return salt, hashlib.scrypt(password.encode(), salt=salt, n=2**14, r=8, p=1)
API_KEY = os.environ["API_KEY"]
""",
    "simulation": """
import random
def sample_walk(steps, seed):
    rng = random.Random(seed)
    position = 0
    for _ in range(steps):
        position += random.choice([-1, 1]) + rng.randint(0, 1)
    return position
keys = random.sample(range(100), 10)
""",
    "processes": """
import shlex, subprocess
def version(tool):
    return subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
print(shlex.join(["ls", "-l"]), version("git"))
""",
    "tls": """
import ssl, urllib.request
context = ssl.create_default_context()
context.minimum_version = ssl.TLSVersion.TLSv1_2
print(urllib.request.urlopen("https://example.org", context=context, timeout=5).status)
""",
    "tokens": """
import jwt, os
def read(token):
    return jwt.decode(token, os.environ["JWT_KEY"], algorithms=["HS256"], audience="app")
""",
    "jinja": """
from jinja2 import Environment, FileSystemLoader, select_autoescape
env = Environment(loader=FileSystemLoader("templates"), autoescape=select_autoescape())
print(env.get_template("page.html").render(title="<b>"))
""",
    "text-template": """
from jinja2 import Template
print(Template("Dear {{ name }},\\n{{ text }}").render(name="A", text="B"))
""",
    "urls": """
import requests
from urllib.parse import quote
def weather(city):
    reply = requests.get(f"https://api.example.org/v1/{quote(city)}", timeout=10)
    reply.raise_for_status()
    return reply.json()
DOCS = "https://user-guide.example.org:8080/a@b"
""",
    "class-and-data": """
from dataclasses import dataclass, field
@dataclass
class Basket:
    items: list[tuple[str, float]] = field(default_factory=list)
    token: str | None = None
    def add(self, name, price):
        self.items.append((name, price))
        return self
    def total(self):
        return sum(price for _, price in self.items)
""",
    "async-work": """
import asyncio
async def fetch(session, url):
    async with session.get(url) as reply:
        return await reply.text()
async def main(session, urls):
    pages = await asyncio.gather(*(fetch(session, url) for url in urls))
    return {url: len(page) for url, page in zip(urls, pages)}
""",
    "numbers-in-pages": """
from flask import Flask, request
app = Flask(__name__)
@app.route("/square")
def square():
    number = int(request.args["n"])
    return f"<p>{number} squared is {number ** 2}, {len(request.args['n'])} digits</p>"
@app.route("/page/<int:number>")
def page(number):
    return f"<h1>Page {number}</h1>"
""",
    "search": """
from flask import Flask, render_template_string, request
app = Flask(__name__)
PAGE = "<h1>{{ query }}</h1>{% for hit in hits %}<p>{{ hit }}</p>{% endfor %}"
@app.route("/search")
def search():
    query = request.args.get("q", "")
    with open("data.txt") as file:
        hits = [line for line in file if query in line]
    return render_template_string(PAGE, query=query, hits=hits)
""",
    "settings": """
import configparser, logging, yaml
log = logging.getLogger(__name__)
def load(path):
    with open(path) as file:
        settings = yaml.safe_load(file)
    log.info("read %s: %d keys", path, len(settings))
    settings["api_key_name"] = "MAIN"
    return settings
""",
}
