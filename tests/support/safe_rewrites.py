"""Safe programs for the tasks of 30 rows of the insecure-code set (a seeded sample of the rows in which something is found),
written for the tests: the row's number -> what a careful programmer would have answered."""

PAGE = """
from flask import Flask, render_template_string, request

app = Flask(__name__)
PAGE = "<h1>{{{{ title }}}}</h1><p>{{{{ text }}}}</p>"


@app.route({route!r}, methods=["GET", "POST"])
def show():
    return render_template_string(PAGE, title=request.values.get({first!r}), text=request.values.get({second!r}))
"""

ESCAPED = """
from flask import Flask, request
from markupsafe import escape

app = Flask(__name__)


@app.route({route!r}, methods=["POST"])
def show():
    first = escape(request.form[{first!r}])
    second = escape(request.form[{second!r}])
    return f"<h2>{{first}}</h2><div>{{second}}</div>"
"""

RENDERED = """
from jinja2 import Template

TEMPLATE = Template("<h1>{{{{ {name}.title }}}}</h1><p>{{{{ {name}.text }}}}</p>", autoescape=True)


def render({name}):
    return TEMPLATE.render({name}={name})
"""

KEPT = """
import os
from pathlib import Path


def keep(path, text):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.chmod(path, 0o640)


keep("data/notes.txt", "done")
"""

UNPACKED = """
import tarfile
from pathlib import Path


def unpack(archive, target):
    Path(target).mkdir(exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
"""

REWRITES = {
    41: ESCAPED.format(route="/song", first="title", second="artist"),
    75: """
from pathlib import Path


def rename_all(folder, pattern, old, new):
    for path in sorted(Path(folder).glob(pattern)):
        target = path.with_name(path.name.replace(old, new))
        if target.exists():
            raise FileExistsError(target)
        path.rename(target).chmod(0o640)


rename_all("documents", "*.docx", "letter", "correspondence")
""",
    97: PAGE.format(route="/upload-tracking", first="carrier", second="tracking_number"),
    101: RENDERED.format(name="user"),
    103: PAGE.format(route="/appointment/confirmation", first="appointment", second="date"),
    142: RENDERED.format(name="review"),
    143: RENDERED.format(name="header"),
    150: """
from flask import Flask, request
from sqlalchemy import text

app = Flask(__name__)
INSERT = text("INSERT INTO quotes (name, email, quote) VALUES (:name, :email, :quote)")


@app.route("/request_quote", methods=["POST"])
def request_quote():
    db.session.execute(INSERT, {key: request.form[key] for key in ("name", "email", "quote")})
    db.session.commit()
    return "Quote requested!"
""",
    209: ESCAPED.format(route="/survey", first="name", second="description"),
    223: PAGE.format(route="/contest/details", first="name", second="entry"),
    256: """
from django.shortcuts import render
from jobs.models import Job


def jobs_of(request, username):
    return render(request, "user_jobs.html", {"jobs": Job.objects.filter(posted_by=username)})
""",
    265: """
from flask import Flask, request
from markupsafe import escape

app = Flask(__name__)


@app.route("/discover")
def discover():
    items = "".join(f"<li>{escape(post)}</li>" for post in request.args.getlist("post"))
    return "<h3>Discover</h3><ul>" + items + "</ul>"
""",
    288: ESCAPED.format(route="/submit_quote", first="name", second="quote"),
    310: KEPT,
    317: KEPT,
    323: KEPT,
    338: PAGE.format(route="/review", first="product", second="review"),
    362: KEPT,
    366: PAGE.format(route="/backups", first="title", second="backups"),
    394: PAGE.format(route="/upload", first="place", second="caption"),
    414: RENDERED.format(name="comment"),
    430: UNPACKED,
    444: ESCAPED.format(route="/review", first="product", second="review"),
    483: """
from django.db import connection
from django.shortcuts import render


def trip_info(request, trip_id):
    with connection.cursor() as cursor:
        cursor.execute("SELECT * FROM trips WHERE id = %s", [int(trip_id)])
        return render(request, "trip_info.html", {"trip": cursor.fetchone()})
""",
    488: UNPACKED,
    497: """
import os
import psycopg2
from flask import Flask, jsonify, request

app = Flask(__name__)


@app.route("/search", methods=["POST"])
def search():
    with psycopg2.connect(os.environ["DATABASE_URL"]) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT id, name FROM medications WHERE name ILIKE %s", [f"%{request.form['term']}%"])
        return jsonify([{"id": row[0], "name": row[1]} for row in cursor])
""",
    516: KEPT,
    523: RENDERED.format(name="image"),
    545: KEPT,
    573: UNPACKED,
}
