"""Pairs of programs, one with a weakness and one that does the same without, for each rule that reads generated Python."""

FLASK = (
    "import os\nfrom flask import (Flask, Response, abort, jsonify, make_response, redirect, render_template,\n"
    "    render_template_string, request, send_file, url_for)\n"
    "from markupsafe import escape\napp = Flask(__name__)\n\n"
)


def view(*body, route="@app.route('/', methods=['POST'])", arguments=""):
    """A Flask view with these lines."""
    return FLASK + f"{route}\ndef view({arguments}):\n" + "".join(f"    {line}\n" for line in body)


def handler(line):
    return f"from http.server import *\nclass H(BaseHTTPRequestHandler):\n    def do_GET(self):\n        {line}\n"


NAME = "name = request.form.get('name')"
PAIRS = [
    # a visitor's text in a page
    ("xss", view(NAME, "return f'<p>{name}</p>'"), view(NAME, "return f'<p>{escape(name)}</p>'")),
    ("xss", view(NAME, "return '<p>{}</p>'.format(name)"), view(NAME, "return render_template('a.html', name=name)")),
    ("xss", view(NAME, "return '<p>%s</p>' % name, 200"), view(NAME, "return jsonify({'page': '<p>%s</p>' % name})")),
    ("xss", view("return 'Hi ' + request.args['n']"), view("return 'Hi ' + str(int(request.args['n']))")),
    ("xss", view("p = '<ul>'", "for x in request.form.getlist('x'):", "    p += f'<li>{x}</li>'", "return p"),
            view("p = '<ul>'", "for x in request.form.getlist('x'):", "    p += f'<li>{escape(x)}</li>'", "return p")),
    ("xss", view("d = {'a': request.args['a']}", "p = '<b>{}</b>'.format(d['a'])", "return make_response(p)"),
            view("d = {'a': request.args['a']}", "return d")),
    ("xss", view("return '<br>'.join([f'{v}' for k, v in request.args.items()])"),
            view("return '<br>'.join(escape(v) for k, v in request.args.items())")),
    ("xss", view("if request.form:", "    n = request.form['n']", "else:", "    n = ''", "return f'<p>{n}</p>'"),
            view("n = request.form['n']", "if request.form:", "    n = escape(n)", "else:", "    n = ''", "return f'<p>{n}</p>'")),
    ("xss", view("return f'<p>{name}</p>'", route="@app.route('/<name>')", arguments="name"),
            view("return f'<p>{name}</p>'", route="@app.route('/<int:name>')", arguments="name")),
    ("xss", view("return Response(f'<p>{request.args[\"x\"]}</p>')"),
            view("return Response(f'<p>{request.args[\"x\"]}</p>', mimetype='text/plain')")),
    ("xss", FLASK + "items = []\n\n@app.route('/add')\ndef add():\n    items.append(request.args['x'])\n    return 'ok'\n\n"
            "@app.route('/all')\ndef show():\n    return '<br>'.join(items)\n",
            FLASK + "items = []\n\n@app.route('/add')\ndef add():\n    items.append(int(request.args['x']))\n    return 'ok'\n\n"
            "@app.route('/all')\ndef show():\n    return '<br>'.join(items)\n"),
    ("xss", FLASK + "items = []\n\n@app.route('/all')\ndef show():\n    return '<br>'.join(items)\n\n"
            "@app.route('/add')\ndef add():\n    items.append(request.args['x'])\n    return 'ok'\n",
            FLASK + "items = []\n\n@app.route('/all')\ndef show():\n    return jsonify(items)\n\n"
            "@app.route('/add')\ndef add():\n    items.append(request.args['x'])\n    return 'ok'\n"),
    ("xss", view("r = make_response('<p>' + request.args['x'])", "r.headers['X-A'] = 'b'", "return r"),
            view("r = make_response('You said ' + request.args['x'])", "r.headers['Content-Type'] = 'text/plain'", "return r")),
    ("xss", "from fastapi import FastAPI\napp = FastAPI()\n@app.get('/', response_class=HTMLResponse)\n"
            "async def f(q: str):\n    return f'<p>{q}</p>'\n",
            "from fastapi import FastAPI\napp = FastAPI()\n@app.get('/')\nasync def f(q: str):\n    return f'<p>{q}</p>'\n"),
    ("xss", "def hello(request):\n    return HttpResponse('<p>' + request.GET['n'] + '</p>')\n",
            "def hello(request):\n    return HttpResponse('<p>' + escape(request.GET['n']) + '</p>')\n"),
    ("xss", handler("self.wfile.write(f'<p>{self.path}</p>'.encode())"), handler("self.wfile.write(b'<p>hi</p>')")),
    # a visitor's text as a template, query, command, path, address
    ("template-injection", view(NAME, "return render_template_string(f'<p>{name}</p>')"),
                           view(NAME, "return render_template_string('<p>{{ name }}</p>', name=name)")),
    ("sql-injection", view("q = 'SELECT a FROM b WHERE c=' + request.args['c']", "db.execute(q)"),
                      view("db.execute('SELECT a FROM b WHERE c=?', (request.args['c'],))")),
    ("sql-injection", view("db.execute(f\"DELETE FROM b WHERE c='{request.args['c']}'\")"),
                      view("db.execute(f\"DELETE FROM b WHERE c={int(request.args['c'])}\")")),
    ("command-injection", view(NAME, "os.system('ping ' + name)"), view(NAME, "subprocess.run(['ping', name])")),
    ("command-injection", view(NAME, "subprocess.run(f'ping {name}', shell=True)"),
                          view(NAME, "subprocess.run(f'ping {shlex.quote(name)}', shell=True)")),
    ("path-traversal", view("return open('files/' + request.args['f']).read()"),
                       view("return open('files/' + secure_filename(request.args['f'])).read()")),
    ("path-traversal", view("f = request.files['f']", "f.save(os.path.join('up', f.filename))"),
                       view("f = request.files['f']", "f.save(os.path.join('up', secure_filename(f.filename)))")),
    ("path-traversal", view("return (Path('a') / request.args['f']).read_text()"),
                       view("f = request.args['f']", "if f not in NAMES:", "    abort(404)",
                            "return (Path('a') / f).read_text()")),
    ("path-traversal", view("f = request.args['f']", "return send_file(f)"), view("return send_file('logo.png')")),
    ("path-traversal", view("p = os.path.join(ROOT, request.args['f'])", "return send_file(p)"),
                       view("p = os.path.join(ROOT, request.args['f'])", "if os.path.commonpath([ROOT, p]) != ROOT:",
                            "    abort(403)", "return send_file(p)")),
    ("path-traversal", handler("open('../' + self.path)"), handler("open('index.html')")),
    ("open-redirect", view("return redirect(request.args['next'])"), view("return redirect(url_for('home'))")),
    ("request-forgery", view("return requests.get(request.args['url'], timeout=3).json()"),
                        view("return requests.get('https://a.example/' + request.args['n'], timeout=3).json()")),
    # patterns
    ("autoescape-off", "from jinja2 import Template\nt = Template(x, autoescape=False)", "t = Template(x, autoescape=True)"),
    ("autoescape-off", "from jinja2 import Template\nt = Template('<p>{{ a }}</p>')",
                       "from string import Template\nt = Template('$a')"),
    ("autoescape-off", "env.autoescape = False", "env.autoescape = True"),
    ("world-writable", "import os\nMODE = 0o777\nos.chmod(p, MODE)", "import os\nMODE = 0o755\nos.chmod(p, MODE)"),
    ("world-writable", "from pathlib import Path\nPath(p).chmod(0o666)", "from pathlib import Path\nPath(p).chmod(0o660)"),
    ("world-writable", "import os, stat\nos.chmod(p, stat.S_IRWXU | stat.S_IRWXO)",
                       "import os, stat\nos.chmod(p, stat.S_IRWXU | stat.S_IROTH)"),
    ("world-writable", "import os\ndef f(p, mode=0o777):\n    os.chmod(p, mode)",
                       "import os\ndef f(p, mode=0o777):\n    os.chmod(p, 0o700)\ndef g(p, mode):\n    os.chmod(p, mode)"),
    ("world-writable", "import os\nos.chmod(p, int('777', 8))", "import os\nos.chmod(p, int('755', 8))"),
    ("world-writable", "import os\nos.umask(0)", "import os\nold = os.umask(0)\nos.umask(old)"),
    ("world-writable", "import os\nfd = os.open(p, os.O_CREAT, 0o777)", "import os\nfd = os.open(p, os.O_CREAT, 0o666)"),
    ("world-writable", "import subprocess\nsubprocess.run(['chmod', '-R', '777', p])",
                       "import subprocess\nsubprocess.run(['chmod', '-R', '755', p])"),
    ("archive-traversal",
     "import tarfile\ndef f(p):\n    with tarfile.open(p) as t:\n        for m in t:\n            t.extract(m, 'o')",
                          "import tarfile\ndef f(p):\n    with tarfile.open(p) as t:\n        t.extractall('o', filter='data')"),
    ("archive-traversal", "import tarfile\ndef f(p):\n    t = tarfile.open(p)\n    t.extractall('o')",
                          "import tarfile\ndef f(p):\n    t = tarfile.open(p)\n    t.extractall('o', members=safe(t))"),
    ("archive-traversal", "import tarfile\ndef f(p):\n    t = tarfile.open(p)\n    t.extractall('o', filter='fully_trusted')",
                          "import zipfile\ndef f(p):\n    t = zipfile.ZipFile(p)\n    t.extractall('o')"),
    ("archive-traversal", "import tarfile\ntarfile.open(p).extractall()", "import tarfile\ntarfile.open(p).extractall(filter='data')"),
    ("archive-traversal",
     "import tarfile, zipfile\na = zipfile.ZipFile(p) if z(p) else None\na = tarfile.open(p)\na.extractall(members=a.getmembers())",
     "import tarfile, zipfile\nwith zipfile.ZipFile(p) as a:\n    a.extractall()\nwith tarfile.open(p) as a:\n    print(a)"),
    ("jwt-unverified", "import jwt\njwt.decode(t, options={'verify_signature': False})",
                       "import jwt\njwt.decode(t, key, algorithms=['HS256'])"),
    ("jwt-unverified", "import jwt\njwt.decode(t, '', algorithms=['none'])", "import json\njson.decode(t, verify=False)"),
    ("tls-unverified", "import ssl\nc = ssl.create_default_context()\nc.check_hostname = False\nc.verify_mode = ssl.CERT_NONE",
                       "import ssl\nc = ssl.create_default_context()\nc.verify_mode = ssl.CERT_REQUIRED"),
    ("tls-unverified", "import requests\ns = requests.Session()\ns.verify = False", "verify = False"),
    ("tls-unverified", "import ssl\nc = ssl._create_unverified_context()", "import ssl\nc = ssl.create_default_context()"),
    ("tls-unverified", "import ssl\nssl.wrap(s, cert_reqs=ssl.CERT_NONE)", "import ssl\nssl.wrap(s, cert_reqs=ssl.CERT_REQUIRED)"),
    ("ecb-mode", "from Crypto.Cipher import AES\nAES.new(k, AES.MODE_ECB)", "from Crypto.Cipher import AES\nAES.new(k, AES.MODE_GCM)"),
    ("unsafe-load", "import jsonpickle\njsonpickle.decode(x)", "import json\njson.loads(x)"),
    ("unsafe-load", "import yaml\nyaml.unsafe_load(x)", "import yaml\nyaml.safe_load(x)"),
    ("fast-password-hash", "import hashlib\nh = hashlib.sha256(password.encode())", "import hashlib\nh = hashlib.sha256(data)"),
    ("cors-any-origin", "CORS(app, origins='*', supports_credentials=True)", "CORS(app, origins='*')"),
    ("hardcoded-credentials", "app.secret_key = 'hunter2hunter2'", "app.secret_key = os.environ['SECRET_KEY']"),
    ("hardcoded-credentials", "app.config['API_KEY'] = 'a1b2c3d4'", "app.config['API_KEY'] = '<your key>'\napi_key = 'apiKey'\n"),
    ("hardcoded-credentials", "e = connect('postgresql://me:s3cret@db/x')", "e = connect('postgresql://db/x')\nf = 'https://a:b'"),
    ("weak-random-secret", "import random\ntoken = ''.join(random.choice(A) for _ in range(9))",
                           "import secrets\ntoken = secrets.token_urlsafe()"),
    ("weak-random-secret", "import random\ndef make_password():\n    return random.randint(0, 9)",
                           "import random\ndef roll_dice():\n    return random.randint(1, 6)"),
]  # fmt: skip
